# Bidirectional Mamba-2 layers instead of attention, with base.py 7.4 M parameters. Each head has
# its own length of memory, so the demo's two heads are too few. Put after a pretraining config.
backbone = "mamba"
num_heads = 8
