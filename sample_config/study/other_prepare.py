# The events of other_detector.py: 30,000 to pretrain on, 10,000 labels, val and report as in prepare.py.
input_dir = "data/other_raw"
data_dir = "data/other"
splits = {"pretrain": (1, 3), "finetune": (4, 4), "val": (5, 5), "report": (6, 6)}
max_pulses = 64
