# A small model on toy events: 0.2 M parameters, minutes on 2 CPU cores. It also differs from
# base.py by best.py's recipe, Muon, and a shorter memory of Adam.
data_dir = "data/demo"
val_events = 2000

embedding_dim = 64
dom_embed_dim = 32
num_heads = 2
hidden_size = 256
num_layers = 3

cls_target = "charge+line_fit"  # as best.py
dom_head = "position"  # as best.py
mask_unit = "string"  # as best.py

batch_size = 128
max_steps = 350
optimizer = "muon"
learning_rate = 1e-2
beta2 = 0.98  # so the warm-up has 50 steps
cooldown_steps = 175

eval_interval = 350
log_interval = 10
save_interval = 50
