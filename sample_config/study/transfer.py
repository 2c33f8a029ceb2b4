# What do the arms of the other studies mean for the direction? 2,000 labels, from seed s of each arm's
# pretraining of 19,200 events.
script = "finetune.py"
shared = "sample_config/study/finetune.py --direction_loss=vmf"
arms = {arm: f"--pretrained=out/study/{arm}/seed{{seed}}/ckpt.pt" for arm in (
    "embedding/positions", "embedding/table", "embedding/both", "masking/mask_prob/0.5",
    "masking/mask_prob/0.75", "targets/center", "targets/charge_and_center", "targets/emd", "targets/ce_emd")}
arms = arms | {
    "float16/float16": "--pretrained=out/study/float16/float16/seed{seed}/ckpt.pt "
                       "--data_dir=data/study_float16",
    "length/32": "--pretrained=out/study/length/max_pulses/32/seed{seed}/ckpt.pt --data_dir=data/study32",
    "length/127": "--pretrained=out/study/length/max_pulses/127/seed{seed}/ckpt.pt --data_dir=data/study127",
    "length/256": "--pretrained=out/study/length/max_pulses/256/seed{seed}/ckpt.pt --data_dir=data/study256"}
learning_rates = "0.0005,0.001,0.002"
metric = "val_angle_mean"
widen = 1
seeds = 2
out_dir = "out/study/transfer"
