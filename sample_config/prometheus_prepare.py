# Ten batches of tools/prometheus.py; its last line has the splits that fit yours.
input_dir = "data/prometheus_raw"
data_dir = "data/prometheus"
splits = {"pretrain": (1, 8), "finetune": (9, 9), "val": (10, 10)}
