# Photon files of Prometheus, simulated in IceCube-86: for python -m tools.prometheus.
input_dir = "data/prometheus_photons"
geometry = "data/kaggle/sensor_geometry.csv"
out_dir = "data/prometheus_raw"
events_per_batch = 10_000
merge_window = 3.3  # [ns] photons of a DOM this close are one pulse; 0 = each photon
angles = "auto"  # by the names of the columns; the light must confirm it
