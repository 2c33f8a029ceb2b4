# AdamW for all weights, at a learning rate of its own (best of an older demo, 700 steps). Put after demo.py;
# mup.py and completep.py need it before them.
optimizer = "adamw"
learning_rate = 5e-3
