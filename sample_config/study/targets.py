# What must pretraining predict, how long, and what carries it? 100,000 events, one epoch if nothing
# else is said. For python -m tools.sweep; labels.py begins with these runs.
base = "sample_config/demo.py sample_config/study/pretrain.py --dtype=float32"
variants = {
    "published": "--cls_target=charge --dom_head=linear --mask_unit=pulse",
    "dom_pulses": "--cls_target=charge --mask_unit=pulse",
    "dom_strings": "--cls_target=charge --mask_unit=string",
    "line_fit": "--lambda_dom=0 --mask_prob=0.01 --mask_unit=pulse",
    "line_fit+dom_pulses": "--mask_unit=pulse",
    "line_fit+dom_strings": "--mask_unit=string",
    "four_epochs": "--max_steps=6240 --cooldown_steps=3120",
    "linear_head": "--dom_head=linear",  # the rest one change each from line_fit+dom_strings
    "table": "--use_dom_positions=False",
}
rates = "0.01"
tuning_seeds = ""
seeds = "0,1,2"
out_dir = "out/study/targets"
