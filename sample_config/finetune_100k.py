# 100,000 labels, 20 epochs. Put after finetune.py. Published: 1.08 rad after pretraining on 130 M
# events, 1.54 from scratch.
train_events = 100_000
max_steps = 1953
warmup_steps = 100
