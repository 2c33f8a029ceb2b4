# Bidirectional Mamba-2 layers instead of attention, 7.4 M parameters. Behind a pretraining config.
backbone = "mamba"
