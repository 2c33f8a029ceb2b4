# Photon files of Prometheus, simulated in IceCube-86; put sensor_geometry.csv beside them. Files count from 1 in sorted order.
source = "prometheus"
input_dir = "data/prometheus_raw"
data_dir = "data/prometheus"
splits = {"pretrain": (1, 8), "finetune": (9, 9), "val": (10, 10)}
merge_window = 3.3  # [ns] photons this close on one DOM are one pulse: a sample of IceCube's 300 MHz digitizer; 0 = none
