# A learned table of the 5160 DOMs instead of their positions. Put after a pretraining config; expect a slower
# start.
use_dom_positions = False
