# Cross-entropy plus earth mover's distance. Behind a pretraining config.
dom_loss = "ce+emd"
