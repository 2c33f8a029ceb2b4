# No norm before the heads, as upstream up to v0.2. Put after a pretraining config.
final_norm = False
