# What must pretraining predict, what must masking hide, how long, and what carries it? 100,000
# events, one epoch if nothing else is said. For python -m tools.sweep; labels.py begins with these
# runs. Two need other events; their losses, of other pulses and another val, do not compare:
#   python prepare.py sample_config/study/prepare.py --data_dir=data/random --keep=random
#   python simulate.py sample_config/study/simulate.py --seed=3 --n_events=400_000 \
#       --out_dir=data/large_raw
#   python prepare.py sample_config/study/prepare.py --input_dir=data/large_raw \
#       --data_dir=data/large --splits="{'pretrain': (1, 39), 'val': (40, 40)}"
base = "sample_config/demo.py sample_config/study/pretrain.py --dtype=float32"
variants = {
    "published": "--cls_target=charge --dom_head=linear --mask_unit=pulse",
    "dom_pulses": "--cls_target=charge --mask_unit=pulse",
    "dom_strings": "--cls_target=charge --mask_unit=string",
    "line_fit": "--lambda_dom=0 --mask_prob=0.01 --mask_unit=pulse",
    "line_fit+dom_pulses": "--mask_unit=pulse",
    "line_fit+dom_strings": "--mask_unit=string",
    "four_epochs": "--max_steps=6240 --cooldown_steps=3120",
    "four_epochs_gelu": "--max_steps=6240 --cooldown_steps=3120 --mlp=gelu",
    "large": "--data_dir=data/large --max_steps=24375 --cooldown_steps=12187",
    "linear_head": "--dom_head=linear",  # the rest one change each from line_fit+dom_strings
    "table": "--use_dom_positions=False",
    "random_pulses": "--data_dir=data/random",
    "masked_doms": "--mask_unit=dom",
    "pulses_or_strings": "--mask_unit=pulse+string",
    "strings_0.15": "--mask_prob=0.15",
    "strings_0.5": "--mask_prob=0.5",
    "line_fit_x3": "--lambda_line_fit=3",
}
rates = "0.01"
tuning_seeds = ""
seeds = "0,1,2,3"
out_dir = "out/study/targets"
