# Direction after best.py, with its uncertainty. Put after finetune.py. Tried on small models.
pretrained = "out/base+best/ckpt.pt"
direction_loss = "vmf"
learning_rate = 2.5e-4  # 1e-3 at 64 wide, times 64 / 256: not tuned at this size
