# What the pretraining runs of all studies share: the demo's model, small steps, 19,200 different events.
data_dir = "data/study"
val_events = 2000

embedding_dim = 64
dom_embed_dim = 32
num_heads = 2
hidden_size = 256
num_layers = 3

batch_size = 32
max_steps = 600
optimizer = "muon"
beta2 = 0.98  # warm-up of 50 steps
cooldown_steps = 300

eval_interval = 10_000  # at the end only
log_interval = 20
save_interval = 10_000
