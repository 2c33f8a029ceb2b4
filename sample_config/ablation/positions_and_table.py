# A learned vector per DOM added to its projected position. Put after a pretraining config.
use_dom_table = True
