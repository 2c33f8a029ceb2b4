# The events of demo_simulate.py, split for the quick start and cut to half of the usual length, to be quick.
input_dir = "data/demo_raw"
data_dir = "data/demo"
splits = {"pretrain": (1, 5), "finetune": (6, 7), "val": (8, 8), "test": "test"}
max_pulses = 64
keep = "brightest"  # of a longer event, study bright: the direction of the brightest ones 1.11 -> 0.52 rad
