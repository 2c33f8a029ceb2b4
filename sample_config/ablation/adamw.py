# AdamW for all weights, at its own learning rate. Put after demo.py, and before mup.py.
optimizer = "adamw"
learning_rate = 5e-3
