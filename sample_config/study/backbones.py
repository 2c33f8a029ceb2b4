# Attention, GRU or Mamba? Backbones of 0.15 M parameters each; over time: python plot.py --what=study --study=backbones --x=seconds
shared = "sample_config/study/train.py --eval_interval=100"
arms = {"transformer": "", "gru": "sample_config/gru.py", "mamba": "sample_config/mamba.py"}
seeds = 2
out_dir = "out/study/backbones"
