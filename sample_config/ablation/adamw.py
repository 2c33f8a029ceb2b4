# AdamW for all weights, at the learning rate it wants in the demo. Put after demo.py; mup.py and completep.py
# need it before them.
optimizer = "adamw"
learning_rate = 5e-3
