# [CLS] also predicts a line fit, a first guess of the direction. Put after a pretraining config.
cls_target = "charge+line_fit"
