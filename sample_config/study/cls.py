# What does [CLS] learn from, and does the DOM head know where DOMs are? Eight recipes of pretraining, 19,200
# events each; cls_labels.py tells what they are worth for the direction.
shared = "sample_config/study/train.py --batch_size=64 --max_steps=300 --cooldown_steps=150"
arms = {f"{target.replace('+', '_')}/{head}": f"--cls_target={target} --dom_head={head}"
        for target in ("charge", "charge+center", "charge+motion", "charge+center+motion")
        for head in ("linear", "position")}
learning_rates = "0.005,0.01,0.02"
widen = 0
out_dir = "out/study/cls"
