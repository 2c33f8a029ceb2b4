# What tools/prometheus.py wrote, if it was ten batches. The tool's last line has your splits.
input_dir = "data/prometheus_raw"
data_dir = "data/prometheus"
splits = {"pretrain": (1, 8), "finetune": (9, 9), "val": (10, 10)}
