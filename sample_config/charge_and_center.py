# [CLS] predicts the charge and its centre. Behind a pretraining config.
cls_target = "both"
