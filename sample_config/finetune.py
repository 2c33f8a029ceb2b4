# Direction from 1 M labels of Kaggle's data, 20 epochs, beginning with the encoder of base.py.
# These are the defaults of finetune.py. With ablation/scratch.py after it: the same labels, no
# pretraining.
data_dir = "data/icecube"
pretrained = "out/base/ckpt.pt"
train_split = "finetune"
train_events = 0  # all
val_split = "val"

batch_size = 1024
max_steps = 19_531  # 20 epochs of 1 M
learning_rate = 1.5e-5  # published; too small from scratch
warmup_steps = 1000
schedule = "cosine"
