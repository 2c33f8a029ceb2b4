# Mask half of the HLC pulses instead of a quarter. dom_loss does not compare, val_dom_loss does.
# Put after a pretraining config.
mask_prob = 0.5
