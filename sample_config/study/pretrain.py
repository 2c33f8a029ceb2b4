# How far does pretraining go with the events seen? One long run, 102,400 different events; labels.py and schedule.py begin from it.
shared = "sample_config/study/train.py --max_steps=3200 --cooldown_steps=800 --keep_every=400 --eval_interval=200"
arms = {"long": ""}
out_dir = "out/study/pretrain"
