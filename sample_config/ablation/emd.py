# Earth mover's distance [100 m] instead of cross-entropy: near misses cost less. Put after a
# pretraining config.
dom_loss = "emd"
