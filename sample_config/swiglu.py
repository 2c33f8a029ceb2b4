# A gated MLP of as many parameters instead of ReLU. Behind a pretraining config.
mlp = "swiglu"
