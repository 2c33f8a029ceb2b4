# Toy events for the demo, in 8 files: 20,000 to pretrain on, 8,000 with labels, 4,000 to validate.
# And 1,000 to predict.
out_dir = "data/demo_raw"
n_events = 32_000
n_test_events = 1000
events_per_batch = 4000
