# No pretraining: the same labels, from random weights. Put after a fine-tuning config.
pretrained = ""
