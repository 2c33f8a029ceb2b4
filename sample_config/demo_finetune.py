# Direction from 8,000 labels, beginning with the encoder of demo.py. With ablation/scratch.py after
# it: from random weights.
data_dir = "data/demo"
pretrained = "out/demo/ckpt.pt"
val_events = 4000

embedding_dim = 64  # as demo.py, for scratch.py
dom_embed_dim = 32
num_heads = 2
hidden_size = 256
num_layers = 3
head_hidden_size = 256
direction_loss = "vmf"  # better than the paper's mean angle (docs/studies.md)

batch_size = 64
max_steps = 250  # 2 epochs of 8,000
learning_rate = 1e-3
beta2 = 0.98
warmup_steps = 50
schedule = "cosine"

eval_interval = 250
log_interval = 10
save_interval = 50
