# One epoch of 100,000 toy events. Put after demo.py; labels.py begins with it.
data_dir = "data/study"
batch_size = 64
max_steps = 1560
cooldown_steps = 780
eval_interval = 780
save_interval = 780
