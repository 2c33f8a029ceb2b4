# log10 of the neutrino's energy instead of its direction. Needs labels, which simulated events
# have. Put after a fine-tuning config.
task = "energy"
