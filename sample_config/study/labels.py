# Do labels go further after pretraining, against scratch with the optimizer it likes? docs/studies.md.
# Seed 0 tunes on val, seeds 1 to 3 report on final; each seed has labels of its own. Before it:
#     python simulate.py --out_dir=data/study_raw --n_events=160_000 --n_test_events=0 --seed=2
#     python prepare.py --input_dir=data/study_raw --data_dir=data/study --max_pulses=64 \
#         --keep=brightest "--splits={'pretrain': (1, 10), 'finetune': (11, 14), 'val': (15, 15), 'final': (16, 16)}"
#     python train.py sample_config/demo.py sample_config/study/pretrain.py --seed=1 --out_dir=out/study/best_1
# with seeds 0 to 3, then python -m tools.sweep sample_config/study/labels.py
script = "finetune"
base = ("sample_config/demo_finetune.py --data_dir=data/study --dtype=float32 --eval_interval=10000 "
        "--save_interval=10000 --log_interval=50 --val_events=2000 --train_start={seed}0000")
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
