# The direction after embedding.py, as labels.py has it after best, which embeds a DOM by its position.
script = "finetune.py"
shared = "sample_config/study/finetune.py --direction_loss=vmf --batch_size=64 --val_events=2000"
arms = {f"{embedding}/{kind}/{n}":
        f"--pretrained=out/study/embedding/{embedding}/seed{{seed}}/ckpt.pt --train_events={n} "
        f"--max_steps={steps} --freeze_backbone={kind == 'frozen'}"
        for embedding in ("table", "both") for kind, n, steps in (("tuned", 500, 100), ("frozen", 2000, 200))}
learning_rates = "0.0005,0.001,0.002"
widen = 1
metric = "val_angle_mean"
report = "report"
wide = "report_angle_mean"
out_dir = "out/study/embedding_labels"
