# Bidirectional GRU layers instead of attention, 7.9 M parameters. Behind a pretraining config.
backbone = "gru"
