# A learned table of the DOMs instead of their positions. Learns more slowly. Put after a
# pretraining config.
use_dom_positions = False
