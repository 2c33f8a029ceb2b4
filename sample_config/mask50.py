# Hide half of the good pulses instead of a quarter. Behind a pretraining config; expect a higher dom_loss.
mask_prob = 0.5
