# When the simulation is not the data: pretraining on MC (data/study) and on the events that play the real
# ones (real_small.py, real_large.py); domain_labels.py tells what it is worth for the direction there.
shared = ("sample_config/study/train.py --batch_size=64 --max_steps=300 --cooldown_steps=150 "
          "--cls_target=charge+motion --dom_head=position")
arms = {"MC": "--data_dir=data/study", "real_small": "--data_dir=data/real_small",
        "real_large": "--data_dir=data/real_large"}
learning_rates = "0.005,0.01,0.02"
widen = 0
out_dir = "out/study/domain"
