# Direction from 8,000 labels, beginning with the encoder of demo.py. Expect 1.0 rad; with scratch.py behind it 1.3 rad.
data_dir = "data/demo"
pretrained = "out/demo/ckpt.pt"

embedding_dim = 96  # as in demo.py, so that scratch.py trains the same architecture
dom_embed_dim = 48
num_heads = 4
hidden_size = 384
num_layers = 3
head_hidden_size = 256

batch_size = 64
micro_batches = 4
max_steps = 500  # 4 epochs of 8,000
learning_rate = 5e-4
beta2 = 0.98
warmup_steps = 50
cooldown_steps = 200

eval_interval = 250
log_interval = 10
save_interval = 100
