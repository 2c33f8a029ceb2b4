# Bidirectional Mamba-2 layers instead of attention, 7.4 M parameters. Put after a pretraining config. Each
# head has a memory of its own length: two of them, as the demo's transformer has, are too few.
backbone = "mamba"
num_heads = 8
