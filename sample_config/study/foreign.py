# KM3NeT's muons, 100 and 300 labels: what does a model of toy events in IceCube know of them? Each
# seed has a random half of its own: python -m tools.km3net --split_seed=1 --out_dir=data/km3net_1_raw
# and so on from 0 to 5, prepared into data/km3net_0 to 5 with --keep=brightest --max_pulses=64.
# For python -m tools.sweep, after labels.py.
script = "finetune"
base = ("sample_config/demo_finetune.py --data_dir=data/km3net_{seed} --dtype=float32 "
        "--val_events=0 --eval_interval=10000 --save_interval=10000 --log_interval=50")
variants = {
    f"{name}/{labels}": f"{options} --train_events={labels}"
    for labels in (100, 300)
    for name, options in {
        "scratch, AdamW": "--pretrained= --max_steps=1000",
        "scratch, Muon": "--pretrained= --max_steps=1000 --optimizer=muon",
        "best.py, AdamW": "--pretrained=out/study/best_1/ckpt.pt --max_steps=400"}.items()}
rates = "0.0005,0.001,0.002,0.004"
tuning_seeds = "0"
seeds = "1,2,3,4,5"
metric = "val_angle_mean"
out_dir = "out/study/foreign"
