# The direction from few labels, after each pretraining of targets.py and from scratch with the
# optimizer that it likes. Seed 0 tunes on val; the others report on final, each with labels and a
# pretraining of its own. For python -m tools.sweep.
script = "finetune"
base = ("sample_config/demo_finetune.py --data_dir=data/study --dtype=float32 --log_interval=50 "
        "--eval_interval=10000 --save_interval=10000 --val_events=2000 --train_start={seed}0000")
report = "--val_split=final --val_events=5000"
variants = {
    f"{name}/{labels}": f"--pretrained=out/study/targets/{name.removesuffix('_muon')}/"
                        f"lr0.01_seed{{seed}}/ckpt.pt --train_events={labels} --max_steps={steps}"
                        + " --optimizer=muon" * name.endswith("_muon")
                        + " --data_dir=data/random" * (name == "random_pulses")
    for labels, steps in ((100, 50), (500, 100), (2000, 300), (8000, 600),
                          (32000, "1500 --train_start=0"))
    for name in ("published", "published_muon", "dom_pulses", "dom_strings", "line_fit",
                 "line_fit+dom_pulses", "line_fit+dom_strings", "line_fit+dom_strings_muon",
                 "four_epochs", "four_epochs_muon", "four_epochs_gelu", "large", "linear_head",
                 "table", "random_pulses", "masked_doms", "pulses_or_strings", "strings_0.15",
                 "strings_0.5", "line_fit_x3")
} | {
    f"scratch/{labels}": f"--pretrained= --optimizer=muon --train_events={labels} "
                         f"--max_steps={steps}"
    for labels, steps in ((500, 500), (2000, 1000), (8000, 2000),
                          (32000, "4000 --train_start=0"))
}
rates = "0.0005,0.001,0.002"  # with AdamW some seeds fail at 0.004
tuning_seeds = "0"
seeds = "1,2,3"
metric = "val_angle_mean"
out_dir = "out/study/labels"
