# A learned vector per DOM added to its projected position. Behind a pretraining config.
use_dom_table = True
