# No pretraining: the same labels and settings from random weights. Put it behind a fine-tuning config.
pretrained = ""
