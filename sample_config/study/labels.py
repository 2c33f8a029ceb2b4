# Do labels go further after pretraining, against scratch with the optimizer it likes? Seed 0 tunes
# on val, seeds 1 to 3 report on final, and each has labels of its own. For python -m tools.sweep;
# docs/studies.md has the commands before it.
script = "finetune"
base = ("sample_config/demo_finetune.py --data_dir=data/study --dtype=float32 --log_interval=50 "
        "--eval_interval=10000 --save_interval=10000 --val_events=2000 --train_start={seed}0000")
report = "--val_split=final --val_events=0"
variants = {
    f"{name}/{labels}": f"{options} --train_events={labels} --max_steps={steps}"
    for labels, steps in ((2000, 300), (8000, 600))
    for name, options in {
        "scratch, AdamW": "--pretrained=",
        "scratch, Muon": "--pretrained= --optimizer=muon",
        "best.py, AdamW": "--pretrained=out/study/best_{seed}/ckpt.pt",
        "best.py, Muon": "--pretrained=out/study/best_{seed}/ckpt.pt --optimizer=muon"}.items()}
rates = "0.0005,0.001,0.002,0.004"
tuning_seeds = "0"
seeds = "1,2,3"
metric = "val_angle_mean"
out_dir = "out/study/labels"
