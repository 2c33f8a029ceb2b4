# The direction from what cls.py pretrained, seed s from seed s of each arm: few labels and many, all weights
# trained (tuned) or the head alone (frozen). One learning rate: from 0.0003 to 0.002 it matters little.
# Reported on events that nothing was tuned on.
script = "finetune.py"
shared = "sample_config/study/finetune.py --direction_loss=vmf --batch_size=64 --val_split=report"
arms = {f"{target}/{head}/{kind}/{n}":
        f"--pretrained=out/study/cls/{target}/{head}/seed{{seed}}/ckpt.pt --train_events={n} --max_steps={steps} "
        f"--freeze_backbone={kind == 'frozen'}"
        for kind in ("tuned", "frozen") for n, steps in ((500, 100), (8000, 300), (2000, 200), (32000, 500))
        for target in ("charge", "charge_center", "charge_motion", "charge_center_motion")
        for head in ("linear", "position")
        if n in (500, 8000) or f"{target}/{head}" in ("charge/linear", "charge_motion/position")}
arms = arms | {f"scratch/{n}": f"--train_events={n} --max_steps={steps}"
               for n, steps in ((500, 100), (2000, 200), (8000, 300), (32000, 500))}
learning_rates = "0.001"
metric = "val_angle_mean"
out_dir = "out/study/cls_labels"
