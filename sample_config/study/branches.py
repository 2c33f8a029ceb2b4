# Cooldowns of 400 steps that branch off the long run of pretrain.py, with its best learning rate.
shared = "sample_config/study/train.py --cooldown_steps=400"
arms = {f"branched/{steps}": f"--branch_from=out/study/pretrain/long/seed{{seed}}/ckpt_{steps - 400}.pt"
        for steps in (800, 1200, 1600, 2400)}
learning_rates = "0.0025"
seeds = 2
out_dir = "out/study/branches"
