# As labels_longest.py, from scratch with all labels in 12,000 steps, at the rate that was best in 6,000.
script = "finetune.py"
shared = "sample_config/study/finetune.py --direction_loss=vmf --batch_size=64 --val_events=2000"
arms = {"scratch/128000": "--data_dir=data/study_all --train_events=128000 --max_steps=12000"}
learning_rates = "0.001"
metric = "val_angle_mean"
report = "report"
out_dir = "out/study/labels_12000"
