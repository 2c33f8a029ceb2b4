# Events for the studies: 16 files of 10,000, other ones than the demo's.
out_dir = "data/study_raw"
n_events = 160_000
n_test_events = 0
seed = 2
