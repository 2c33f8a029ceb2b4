# Direction from scratch, by the optimizer that suits it. Put after finetune.py. Tried on small
# models: Muon at 2e-3, 64 wide. At the published 1.5e-5 it finds one direction for all events.
pretrained = ""
direction_loss = "vmf"
optimizer = "muon"
learning_rate = 5e-4  # times 64 / 256: not tuned at this size
