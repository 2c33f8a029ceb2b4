# [CLS] predicts the charge and its centre. Put after a pretraining config.
cls_target = "charge+center"
