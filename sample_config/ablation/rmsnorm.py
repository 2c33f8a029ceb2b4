# RMSNorm instead of LayerNorm. Put after a pretraining config.
norm = "rmsnorm"
