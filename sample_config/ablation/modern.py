# Gated MLP, RMSNorm, and normalised queries and keys. Put after a pretraining config.
mlp = "swiglu"
norm = "rmsnorm"
qk_norm = True
