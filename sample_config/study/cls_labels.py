# The direction from what cls.py pretrained, seed s from seed s of each arm: few labels and many, all weights
# trained (tuned) or the head alone (frozen). One learning rate for all, not tuned; labels.py tunes it.
# Reported on events that nothing was tuned on.
script = "finetune.py"
shared = ("sample_config/study/finetune.py --direction_loss=vmf --batch_size=64 --val_split=report "
          "--val_events=2000")
arms = {f"{recipe}/{kind}/{n}":
        f"--pretrained=out/study/cls/{recipe}/seed{{seed}}/ckpt.pt --train_events={n} "
        f"--max_steps={steps} --freeze_backbone={kind == 'frozen'}"
        for recipe in ("charge/linear", "charge/position", "charge_center/linear", "charge_center/position",
                       "charge_motion/linear", "charge_motion/position", "charge_center_motion/linear",
                       "charge_center_motion/position")
        for kind, n, steps in (("tuned", 500, 100), ("tuned", 2000, 200), ("tuned", 8000, 250),
                               ("tuned", 32000, 500), ("frozen", 500, 100), ("frozen", 2000, 150),
                               ("frozen", 8000, 250), ("frozen", 32000, 500))}
arms = arms | {f"scratch/tuned/{n}": f"--train_events={n} --max_steps={steps}"
               for n, steps in ((500, 100), (2000, 200), (8000, 250), (32000, 500))}
learning_rates = "0.001"
metric = "val_angle_mean"
wide = "val_angle_mean"
out_dir = "out/study/cls_labels"
