# No pretraining: the same labels and settings from random weights. Put after a fine-tuning config.
pretrained = ""
