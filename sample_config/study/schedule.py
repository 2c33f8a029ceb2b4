# Trapezoid or cosine, at several lengths? branches.py has cooldowns that branch off one long run.
arms = {f"{name}/{steps}": f"--schedule={name} --max_steps={steps} --cooldown_steps=400"
        for name in ("trapezoidal", "cosine") for steps in (800, 1600)}
out_dir = "out/study/schedule"
