# 500 labels instead of 8,000, 12 epochs. Put after demo_finetune.py.
train_events = 500
max_steps = 100
