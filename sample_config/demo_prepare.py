# The simulated events of simulate.py, split for the quick start: 8 batches as it writes them by default.
input_dir = "data/demo_raw"
data_dir = "data/demo"
splits = {"pretrain": (1, 6), "finetune": (7, 7), "val": (8, 8), "test": "test"}
