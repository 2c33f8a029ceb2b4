# Warm-up and cooldown, 50,000 events: one change each from base. For python -m tools.sweep.
base = ("sample_config/demo.py sample_config/study/pretrain.py --dtype=float32 --max_steps=780 "
        "--eval_interval=780 --save_interval=780 --cooldown_steps=390")
variants = {
    "base": "",  # warm-up 1 / (1 - beta2) = 50 steps, cooldown half
    "no_warmup": "--warmup_steps=1",
    "ten_times_the_warmup": "--warmup_steps=500",
    "no_cooldown": "--cooldown_steps=1",
    "cooldown_10_percent": "--cooldown_steps=78",
    "cosine": "--schedule=cosine",
}
rates = "0.005,0.01"
tuning_seeds = "0"
seeds = "1,2,3"
metric = "val_string_dom_loss"
out_dir = "out/study/schedule"
