# log10 of the neutrino's energy instead of its direction. Put after a fine-tuning config; needs labels
# (simulated, Prometheus).
task = "energy"
