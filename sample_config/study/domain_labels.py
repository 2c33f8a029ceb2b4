# The direction from 8,000 labels of MC after pretraining on MC or on real, from scratch, and from labels of
# real (the ceiling). Tuned on val of the place that the labels are from; report_... are of its report. How
# the others do on real: docs/studies.md says how to evaluate them there.
script = "finetune.py"
shared = ("sample_config/study/finetune.py --direction_loss=vmf --batch_size=64 --train_events=8000 "
          "--max_steps=1000 --val_events=2000")
arms = {f"{place}/{labels}/{how}":
        f"--data_dir=data/{labels.replace('MC', 'study')} --freeze_backbone={how == 'frozen'} "
        f"--pretrained=out/study/domain/{place}/seed{{seed}}/ckpt.pt"
        for place, labels in (("MC", "MC"), ("real_small", "MC"), ("real_large", "MC"),
                              ("real_small", "real_small"), ("real_large", "real_large"))
        for how in ("tuned", "frozen")}
arms = arms | {"scratch/MC/tuned": "--data_dir=data/study"}
learning_rates = "0.0005,0.001,0.002"
widen = 0
metric = "val_angle_mean"
report = "report"
out_dir = "out/study/domain_labels"
