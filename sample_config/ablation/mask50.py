# Hide half of the good pulses instead of a quarter. The dom_loss is then of other pulses, and more of them.
# Put after a pretraining config.
mask_prob = 0.5
