# KM3NeT's muons, 100 and 300 labels: what does a model of toy events in IceCube know of them? Each
# seed has a random half of its own, 0 to 5:
#   python -m tools.km3net --split_seed=1 --out_dir=data/km3net_1_raw
#   python prepare.py --input_dir=data/km3net_1_raw --data_dir=data/km3net_1 --keep=brightest \
#       --max_pulses=64 --splits="{'finetune': (1, 1), 'val': (2, 2)}"
# For python -m tools.sweep, after targets.py.
script = "finetune"
base = ("sample_config/demo_finetune.py --data_dir=data/km3net_{seed} --dtype=float32 "
        "--val_events=0 --eval_interval=10000 --save_interval=10000 --log_interval=50")
variants = {
    f"{name}/{labels}": f"--pretrained=out/study/targets/{name}/lr0.01_seed1/ckpt.pt "
                        f"--train_events={labels} --max_steps=400"
    for labels in (100, 300)
    for name in ("published", "line_fit+dom_pulses", "line_fit+dom_strings", "four_epochs", "large")
} | {
    f"scratch_{name}/{labels}": f"--pretrained= --train_events={labels} --max_steps=1000 "
                                f"--optimizer={name}"
    for labels in (100, 300) for name in ("muon", "adamw")
}
rates = "0.0005,0.001,0.002"
tuning_seeds = "0"
seeds = "1,2,3,4,5"
metric = "val_angle_mean"
out_dir = "out/study/foreign"
