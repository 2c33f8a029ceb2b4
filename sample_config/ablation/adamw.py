# AdamW for all weights, at the learning rate it wants in the demo. Put after demo.py, for example before
# mup.py or completep.py.
optimizer = "adamw"
learning_rate = 5e-3
