# Trapezoid or cosine, in runs of two lengths? The trapezoid of 600 steps is positions of embedding.py;
# branches.py has cooldowns that branch off one long run.
arms = {"trapezoidal/300": "--max_steps=300 --cooldown_steps=150",
        "cosine/300": "--max_steps=300 --schedule=cosine", "cosine/600": "--schedule=cosine"}
learning_rates = "0.01,0.02,0.04"
seeds = 2
out_dir = "out/study/schedule"
