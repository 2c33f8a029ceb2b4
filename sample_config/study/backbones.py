# Attention, GRU or Mamba? Backbones of 0.15 M parameters each. Over time:
#     python -m tools.plot --what=study --study=backbones --x=seconds
shared = "sample_config/study/train.py --eval_interval=100"
arms = {"transformer": "", "gru": "sample_config/ablation/gru.py", "mamba": "sample_config/ablation/mamba.py"}
seeds = 2
out_dir = "out/study/backbones"
