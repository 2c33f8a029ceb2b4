# Mask half of the HLC pulses instead of a quarter. The DOM losses do not compare. Put after a
# pretraining config.
mask_prob = 0.5
