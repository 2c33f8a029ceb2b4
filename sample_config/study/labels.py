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
best, scratch = "--pretrained=out/study/best_{seed}/ckpt.pt", "--pretrained="
few, many = "--train_events=2000 --max_steps=300", "--train_events=8000 --max_steps=600"
variants = {
    "scratch, AdamW/2000": f"{scratch} {few}",
    "scratch, Muon/2000": f"{scratch} {few} --optimizer=muon",
    "best.py, AdamW/2000": f"{best} {few}",
    "best.py, Muon/2000": f"{best} {few} --optimizer=muon",
    "scratch, AdamW/8000": f"{scratch} {many}",
    "scratch, Muon/8000": f"{scratch} {many} --optimizer=muon",
    "best.py, AdamW/8000": f"{best} {many}",
}
rates = "0.0005,0.001,0.002,0.004"
tuning_seeds = "0"
seeds = "1,2,3"
metric = "val_angle_mean"
out_dir = "out/study/labels"
