# log10 of the neutrino's energy instead of its direction. Behind a fine-tuning config; needs labels (simulated, Prometheus).
task = "energy"
