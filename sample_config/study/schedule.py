# Trapezoid or cosine, in a long run? The trapezoid is pretrain.py; schedule_short.py asks it of short ones, and branches.py has
# cooldowns that branch off one long run.
arms = {"cosine": "--schedule=cosine --max_steps=3200"}
learning_rates = "0.00125,0.0025,0.005"
seeds = 2
out_dir = "out/study/schedule"
