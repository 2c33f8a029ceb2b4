# Photon files of Prometheus, simulated in IceCube-86, to the Kaggle layout: for python -m tools.prometheus.
input_dir = "data/prometheus_photons"
geometry = "data/kaggle/sensor_geometry.csv"
out_dir = "data/prometheus_raw"
events_per_batch = 10_000
merge_window = 3.3  # [ns] photons of a DOM this close are one pulse: a sample of 300 MHz; 0 = none
angles = "flight"  # which way they point in the files; the tool checks it against the light and warns
