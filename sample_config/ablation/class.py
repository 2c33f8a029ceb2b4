# Track or cascade instead of the direction. Needs labels, which simulated events have. Put after a
# fine-tuning config.
task = "class"
