# Normalised queries and keys, which bounds the attention logits. Behind a pretraining config.
qk_norm = True
