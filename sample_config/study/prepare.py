# The events of simulate.py: 100,000 to pretrain on, 40,000 labels, 10,000 that tune learning rates (val) and
# 10,000 that are reported and tuned on by nothing (report).
input_dir = "data/study_raw"
data_dir = "data/study"
splits = {"pretrain": (1, 10), "finetune": (11, 14), "val": (15, 15), "report": (16, 16)}
max_pulses = 64
