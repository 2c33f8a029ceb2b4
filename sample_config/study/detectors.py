# One model, another detector: the masked task in other_detector.py after pretraining in IceCube (seed s of
# cls.py), against beginning there. The first line of each log.csv, step 0, is the model as it came.
shared = ("sample_config/study/train.py --data_dir=data/other --batch_size=64 --cls_target=charge+motion "
          "--dom_head=position")
arms = {"icecube/100": "--pretrained=out/study/cls/charge_motion/position/seed{seed}/ckpt.pt --max_steps=100 "
                       "--cooldown_steps=50",
        "there/100": "--max_steps=100 --cooldown_steps=50",
        "there/300": "--max_steps=300 --cooldown_steps=150"}
learning_rates = "0.01"
out_dir = "out/study/detectors"
