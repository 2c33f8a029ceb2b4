# A gated MLP of as many parameters instead of ReLU. Put after a pretraining config.
mlp = "swiglu"
