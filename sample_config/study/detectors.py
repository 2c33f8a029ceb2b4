# One model, another detector: the masked task in other_detector.py after pretraining in IceCube (seed s of
# cls.py), against beginning there. icecube/1 is the model as it came: its single step has 1/50 of the
# learning rate.
shared = ("sample_config/study/train.py --data_dir=data/other --batch_size=64 --cls_target=charge+motion "
          "--dom_head=position")
arms = {f"{name}/{steps}": f"{start} --max_steps={steps} --cooldown_steps={cooldown}"
        for name, start, lengths in (
            ("icecube", "--pretrained=out/study/cls/charge_motion/position/seed{seed}/ckpt.pt",
             ((1, 1), (100, 50))),
            ("there", "", ((100, 50), (300, 150)))) for steps, cooldown in lengths}
learning_rates = "0.01"
out_dir = "out/study/detectors"
