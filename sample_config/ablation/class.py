# Track or cascade instead of the direction. Put after a fine-tuning config; needs labels (simulated,
# Prometheus).
task = "class"
