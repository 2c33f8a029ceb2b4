# From [CLS] also a first guess of the direction: the way the light moves. Put after a pretraining config.
cls_target = "charge+motion"
