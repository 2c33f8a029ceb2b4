# [CLS] predicts the centre of charge instead of the charge. Behind a pretraining config.
cls_target = "center"
