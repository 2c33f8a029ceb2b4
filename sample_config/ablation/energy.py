# log10 of the neutrino's energy instead of its direction. Needs labels, as simulate.py and Prometheus have.
# Put after a fine-tuning config.
task = "energy"
