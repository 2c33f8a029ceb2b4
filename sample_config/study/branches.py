# Short runs that branch off a long one of schedule.py, which tells their learning rate, or full ones?
shared = "sample_config/study/train.py --batch_size=64 --cls_target=charge+motion --dom_head=position"
arms = {f"branched/{steps}": "--branch_from=out/study/schedule/trapezoidal/1600/seed{seed}/"
        f"ckpt_{steps // 2}.pt --cooldown_steps={steps // 2}" for steps in (200, 400, 800)}
learning_rates = "0.005"
out_dir = "out/study/branches"
