# Bidirectional GRU layers instead of attention, 7.9 M parameters. Put after a pretraining config.
backbone = "gru"
