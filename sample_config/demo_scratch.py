# The same 8,000 labels without pretraining, with Muon, which is better from scratch, and four
# times as many steps. Put after demo_finetune.py.
pretrained = ""
optimizer = "muon"
learning_rate = 2e-3
max_steps = 1000
eval_interval = 1000
