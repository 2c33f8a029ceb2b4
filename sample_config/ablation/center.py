# [CLS] predicts the centre of charge instead of the charge. Put after a pretraining config.
cls_target = "center"
