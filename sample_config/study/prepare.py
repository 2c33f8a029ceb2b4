# 100,000 events to pretrain on, 40,000 with labels, 10,000 that tune, 10,000 that are reported.
input_dir = "data/study_raw"
data_dir = "data/study"
splits = {"pretrain": (1, 10), "finetune": (11, 14), "val": (15, 15), "final": (16, 16)}
max_pulses = 64
keep = "brightest"
