# Bidirectional GRU layers instead of attention, with base.py 7.9 M parameters. Put after a
# pretraining config.
backbone = "gru"
