# The events of real_small.py: 30,000 to pretrain on, 10,000 labels for the ceiling, val and report as in
# prepare.py. Those of real_large.py: --input_dir=data/real_large_raw --data_dir=data/real_large
input_dir = "data/real_small_raw"
data_dir = "data/real_small"
splits = {"pretrain": (1, 3), "finetune": (4, 4), "val": (5, 5), "report": (6, 6)}
max_pulses = 64
