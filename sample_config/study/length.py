# How many pulses of an event? 64 is the arm positions of embedding.py. Needs the events with at most N = 32,
# 127 and 256 pulses:
#     python prepare.py sample_config/study/prepare.py --max_pulses=N --data_dir=data/studyN
arms = {f"max_pulses/{n}": f"--data_dir=data/study{n}" for n in (32, 127, 256)}
learning_rates = "0.01,0.02,0.04"
seeds = 2
out_dir = "out/study/length"
