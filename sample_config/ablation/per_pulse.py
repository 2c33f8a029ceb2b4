# The DOM loss as a mean over hidden pulses (paper v0.1): bright events count more.
# Put after a pretraining config.
loss_weighting = "per_pulse"
