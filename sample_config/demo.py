# A small model on simulated events, 4 minutes on 2 CPU cores. Against base.py: 0.5 M parameters, a shorter
# memory of Adam, Muon: after 700 steps AdamW (learning rate 5e-3) ended at val_dom_loss 4.05, Muon at 3.69;
# the direction at 1.39 and 1.17 rad (1 seed).
data_dir = "data/demo"
val_events = 2000

embedding_dim = 64
dom_embed_dim = 32
num_heads = 2
hidden_size = 256
num_layers = 3

batch_size = 128
max_steps = 600
optimizer = "muon"
learning_rate = 1e-2
beta2 = 0.98  # warm-up of 50 steps
cooldown_steps = 300

eval_interval = 300
log_interval = 10
save_interval = 100
