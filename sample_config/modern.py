# Gated MLP, RMSNorm and normalised queries and keys. Behind demo.py: val_dom_loss 3.77 instead of 3.99 after 700 steps (1 seed, CPU, float32).
mlp = "swiglu"
norm = "rmsnorm"
qk_norm = True
