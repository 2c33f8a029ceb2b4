# How far does pretraining go with the events seen, the paper's recipe and best.py's? One epoch of 100,000
# events; labels.py begins from it.
shared = ("sample_config/study/train.py --batch_size=64 --max_steps=1560 --cooldown_steps=780 "
          "--eval_interval=195")
arms = {"paper": "--cls_target=charge --dom_head=linear",
        "best": "--cls_target=charge+motion --dom_head=position"}
learning_rates = "0.0025,0.005,0.01"
widen = 1
out_dir = "out/study/pretrain"
