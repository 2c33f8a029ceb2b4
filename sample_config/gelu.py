# GELU instead of ReLU in the MLP. Behind a pretraining config.
mlp = "gelu"
