# Gated MLP, RMSNorm and normalised queries and keys. Put after demo.py with AdamW
# (learning rate 5e-3): val_dom_loss 3.78 +- 0.03 instead of 4.05 +- 0.03 (700 steps, seeds 1 to 3, CPU,
# float32).
mlp = "swiglu"
norm = "rmsnorm"
qk_norm = True
