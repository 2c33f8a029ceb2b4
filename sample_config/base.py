# The paper's pretraining run, spelled out; equal to the defaults of train.py but for compile. 7.6 M
# parameters, 520 M events.
data_dir = "data/icecube"
train_split = "pretrain"
val_split = "val"
train_events = 0  # all
val_events = 100_000

embedding_dim = 256
dom_embed_dim = 128
num_heads = 8
hidden_size = 1024
num_layers = 8
use_dom_positions = True
backbone = "transformer"
mlp = "relu"
norm = "layernorm"
final_norm = True

batch_size = 4096
max_steps = 127_000  # 520 M events: 4 epochs of all 130 M, 5.2 of batches 1-500
learning_rate = 1e-3
schedule = "trapezoidal"
warmup_steps = 0  # 1 / (1 - beta2) = 5000
cooldown_steps = 1000
beta1 = 0.9
beta2 = 0.9998
adam_eps = 5e-7
weight_decay = 0.1
grad_clip = 1.0

mask_prob = 0.25
lambda_charge = 1.0
dom_loss = "ce"
loss_weighting = "per_event"
cls_target = "charge"

compile = True  # 1.4 times as fast on a GPU, the first step a minute longer; short runs: --compile=False
