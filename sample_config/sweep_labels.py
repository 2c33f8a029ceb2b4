# The direction from 500 and 2,000 labels, from scratch and after the demo's pretraining. Each
# variant gets its own learning rate. Short runs, to show the form. For python -m tools.sweep, after
# python train.py sample_config/demo.py.
script = "finetune"
base = "sample_config/demo_finetune.py --max_steps=100 --warmup_steps=20 --val_events=1000"
variants = {
    "pretrained/500": "--train_events=500",
    "pretrained/2000": "--train_events=2000",
    "scratch/500": "sample_config/ablation/scratch.py --train_events=500",
    "scratch/2000": "sample_config/ablation/scratch.py --train_events=2000",
}
rates = "0.0005,0.001,0.002"
tuning_seeds = "0"
seeds = "1,2"
metric = "val_angle_mean"
