# How many labels does pretraining save? Direction from pretrained, frozen and random weights. Seed s begins from seed s of pretrain.py.
script = "finetune.py"
shared = "sample_config/study/finetune.py"
arms = {f"{kind}/{n}": f"{start} --train_events={n} --max_steps={steps}"
        for kind, start in (("pretrained", "--pretrained=out/study/pretrain/long/seed{seed}/ckpt.pt"),
                            ("frozen", "--pretrained=out/study/pretrain/long/seed{seed}/ckpt.pt --freeze_backbone=True"),
                            ("scratch", ""))
        for n, steps in ((500, 200), (2000, 400), (8000, 800), (32000, 1600))}
learning_rates = "0.0005,0.001,0.002"
metric = "val_angle_mean"
seeds = 2
out_dir = "out/study/labels"
