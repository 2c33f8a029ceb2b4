# The direction from what cls.py pretrained, seed s from seed s of each arm: few labels and many, all weights
# trained (tuned) or the head alone (frozen). One learning rate: from 0.0003 to 0.002 it matters little.
# Reported on events that nothing was tuned on.
script = "finetune.py"
shared = ("sample_config/study/finetune.py --direction_loss=vmf --batch_size=64 --val_split=report "
          "--val_events=2000")
arms = {f"{target}/{head}/{kind}/{n}":
        f"--pretrained=out/study/cls/{target}/{head}/seed{{seed}}/ckpt.pt --train_events={n} "
        f"--max_steps={steps} --freeze_backbone={kind == 'frozen'}"
        for kind, n, steps in (("tuned", 500, 100), ("tuned", 8000, 250), ("frozen", 2000, 150))
        for target in ("charge", "charge_motion") for head in ("linear", "position")}
arms = arms | {f"{target}/tuned/{n}":
               f"--pretrained=out/study/cls/{target}/seed{{seed}}/ckpt.pt --train_events={n} "
               f"--max_steps={steps}"
               for n, steps in ((2000, 200), (32000, 500))
               for target in ("charge/linear", "charge_motion/position")}
arms = arms | {f"scratch/{n}": f"--train_events={n} --max_steps={steps}"
               for n, steps in ((500, 100), (8000, 250), (2000, 200), (32000, 500))}
learning_rates = "0.001"
metric = "val_angle_mean"
out_dir = "out/study/cls_labels"
