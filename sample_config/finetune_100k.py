# 100,000 labels, 20 epochs. Put after finetune.py. Published: 1.08 rad after pretraining on 130 M events,
# 1.54 from scratch (ablation/scratch.py after it), each with a learning rate of its own.
train_events = 100_000
max_steps = 1953
warmup_steps = 100
