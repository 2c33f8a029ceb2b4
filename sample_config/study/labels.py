# How many labels does pretraining save? Direction from pretrained, random and frozen weights, with the loss
# that direction_loss.py found best. Seed s begins from seed s of pretrain.py. To compare with: a line fit is
# off by 1.179 rad, which the table at the end of each run shows; the same direction for all, zenith = pi, by
# 1.535 rad:
#     python -c "
#     import math, data
#     print(math.pi - data.open_split('data/study', 'val').events['zenith'][:4000].mean())"
script = "finetune.py"
shared = "sample_config/study/finetune.py --direction_loss=vmf"
arms = {f"{kind}/{n}": f"{start} --train_events={n} --max_steps={steps}"
        for kind, start in (("pretrained", "--pretrained=out/study/pretrain/long/seed{seed}/ckpt.pt"),
                            ("scratch", ""),
                            ("frozen", "--pretrained=out/study/pretrain/long/seed{seed}/ckpt.pt "
                                       "--freeze_backbone=True"))
        for n, steps in ((500, 200), (2000, 400), (8000, 800), (32000, 1600))
        if kind != "frozen" or n in (500, 32000)}
learning_rates = "0.0005,0.001,0.002"
metric = "val_angle_mean"
seeds = 2
out_dir = "out/study/labels"
