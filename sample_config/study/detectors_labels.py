# The direction in other_detector.py with 500 and 8,000 of its labels: after pretraining in IceCube alone,
# there alone, in IceCube and then for 100 steps there, and from scratch.
script = "finetune.py"
shared = ("sample_config/study/finetune.py --data_dir=data/other --direction_loss=vmf --batch_size=64 "
          "--val_split=report --val_events=2000")
arms = {f"{name}/{n}": f"{start} --train_events={n} --max_steps={steps}"
        for name, start in (
            ("icecube", "--pretrained=out/study/cls/charge_motion/position/seed{seed}/ckpt.pt"),
            ("there", "--pretrained=out/study/detectors/there/300/seed{seed}/ckpt.pt"),
            ("icecube_and_there", "--pretrained=out/study/detectors/icecube/100/seed{seed}/ckpt.pt"),
            ("scratch", "")) for n, steps in ((500, 100), (8000, 250))}
learning_rates = "0.001"
metric = "val_angle_mean"
out_dir = "out/study/detectors_labels"
