# Trapezoid or cosine, in runs of four lengths? branches.py cools down from the longest trapezoid.
shared = ("sample_config/study/train.py --batch_size=64 --keep_every=100 "
          "--cls_target=charge+motion --dom_head=position")
arms = {f"{schedule}/{steps}": f"--max_steps={steps} --cooldown_steps={steps // 2} --schedule={schedule}"
        for schedule in ("trapezoidal", "cosine") for steps in (200, 400, 800, 1600)}
learning_rates = "0.0025,0.005,0.01"
widen = 1
out_dir = "out/study/schedule"
