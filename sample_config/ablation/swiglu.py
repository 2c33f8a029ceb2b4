# Gated MLP instead of ReLU, with as many parameters. Put after a pretraining config.
mlp = "swiglu"
