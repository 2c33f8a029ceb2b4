# RMSNorm instead of LayerNorm. Behind a pretraining config.
norm = "rmsnorm"
