# Many steps: as in labels.py with up to three times as many, from scratch and after best.py's pretraining.
script = "finetune.py"
shared = "sample_config/study/finetune.py --direction_loss=vmf --batch_size=64 --val_events=2000"
arms = {f"scratch/{n}": f"--data_dir=data/study_all --train_events={n} --max_steps={steps}"
        for n, steps in {8000: 3000, 32000: 6000, 128000: 6000}.items()}
arms = arms | {f"best/{n}": "--pretrained=out/study/pretrain/best/seed{seed}/ckpt.pt "
                            f"--train_events={n} --max_steps={steps}"
               for n, steps in {8000: 3000, 32000: 6000}.items()}
learning_rates = "0.0005,0.001,0.002"
widen = 0
metric = "val_angle_mean"
report = "report"
wide = "report_angle_mean"
out_dir = "out/study/labels_longest"
