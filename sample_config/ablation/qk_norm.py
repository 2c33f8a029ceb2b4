# Normalise queries and keys, which bounds the attention logits. Put after a pretraining config.
qk_norm = True
