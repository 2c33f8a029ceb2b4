# As many steps as it wants: from scratch as in labels.py, 32,000 labels in 6,000 steps instead of 2,000.
script = "finetune.py"
shared = "sample_config/study/finetune.py --direction_loss=vmf --batch_size=64 --val_events=2000"
arms = {"scratch/32000": "--data_dir=data/study_all --train_events=32000 --max_steps=6000"}
learning_rates = "0.0005,0.001,0.002"
widen = 0
metric = "val_angle_mean"
report = "report"
wide = "report_angle_mean"
out_dir = "out/study/labels_longest"
