# What the fine-tuning runs of all studies share; 2,000 labels unless an arm says otherwise.
data_dir = "data/study"
pretrained = ""
train_events = 2000
val_events = 4000

embedding_dim = 64  # as in train.py, for the runs from scratch
dom_embed_dim = 32
num_heads = 2
hidden_size = 256
num_layers = 3
head_hidden_size = 256

batch_size = 32
max_steps = 400
beta2 = 0.98
warmup_steps = 50
schedule = "cosine"

eval_interval = 10_000  # at the end only
log_interval = 20
save_interval = 10_000
