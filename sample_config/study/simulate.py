# Simulated events for all studies: 24 files of 10,000.
out_dir = "data/study_raw"
n_events = 240_000
n_test_events = 0
