# The events of demo_simulate.py in splits, cut to 64 pulses instead of 127, to be quick.
input_dir = "data/demo_raw"
data_dir = "data/demo"
splits = {"pretrain": (1, 5), "finetune": (6, 7), "val": (8, 8), "test": "test"}
max_pulses = 64
keep = "brightest"  # 1.11 -> 0.52 rad for the brightest events (docs/studies.md, bright)
