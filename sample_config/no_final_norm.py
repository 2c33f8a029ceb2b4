# No norm before the heads, as upstream had it up to v0.2. Behind a pretraining config.
final_norm = False
