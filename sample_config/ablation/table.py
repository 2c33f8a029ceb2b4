# A learned table of the 5160 DOMs instead of their positions. Expect a slower start.
# Put after a pretraining config.
use_dom_positions = False
