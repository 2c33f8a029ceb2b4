# Pretraining at full size: 7.6 M parameters, 520 M events. These are the defaults of train.py,
# except compile. Sources: slide = the authors' second talk, advice = the same talk's advice,
# published = the published example, ours = no published source.
data_dir = "data/icecube"
train_split = "pretrain"
val_split = "val"
train_events = 0  # all
val_events = 100_000

embedding_dim = 256  # slide, as the next four and published
dom_embed_dim = 128
num_heads = 8
hidden_size = 1024
num_layers = 8
use_dom_positions = True  # slide
backbone = "transformer"
mlp = "relu"
norm = "layernorm"
final_norm = True  # ours

batch_size = 4096  # ours
max_steps = 127_000  # ours: 4 epochs of all 130 M events, 5.1 of batches 1-500
learning_rate = 1e-3  # ours
schedule = "trapezoidal"  # advice
warmup_steps = 0  # advice: 1 / (1 - beta2) = 5000
cooldown_steps = 1000  # advice
beta1 = 0.9  # ours
beta2 = 0.9998  # published
adam_eps = 5e-7  # ours
weight_decay = 0.1  # ours
grad_clip = 1.0  # ours

mask_prob = 0.25  # published
lambda_charge = 1.0  # slide
dom_loss = "ce"  # published
cls_target = "charge"  # published

compile = True  # on a GPU 1.4 times as fast, but the first step takes a minute longer
