# Hide half of the good pulses instead of a quarter. Put after a pretraining config; its dom_loss counts other
# pulses, and more of them.
mask_prob = 0.5
