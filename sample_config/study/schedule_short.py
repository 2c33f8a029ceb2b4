# Trapezoid or cosine, in runs of 600 steps? The trapezoid is positions of embedding.py.
arms = {"cosine": "--schedule=cosine"}
learning_rates = "0.01,0.02,0.04"
seeds = 2
out_dir = "out/study/schedule_short"
