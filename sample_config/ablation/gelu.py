# GELU instead of ReLU in the MLP. Put after a pretraining config.
mlp = "gelu"
