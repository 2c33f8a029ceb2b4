# Cross-entropy plus earth mover's distance. Put after a pretraining config.
dom_loss = "ce+emd"
