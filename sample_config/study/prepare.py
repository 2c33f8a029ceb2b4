# The events of simulate.py: 160,000 to pretrain on, 40,000 labels, 40,000 to validate. For other lengths see
# length.py.
input_dir = "data/study_raw"
data_dir = "data/study"
splits = {"pretrain": (1, 16), "finetune": (17, 20), "val": (21, 24)}
max_pulses = 64
