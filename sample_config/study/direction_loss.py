# Angle, cosine or von Mises-Fisher: which loss gives the smaller angle with 8,000 labels?
# And does vmf's kappa tell the truth?
script = "finetune.py"
shared = ("sample_config/study/finetune.py --pretrained=out/study/pretrain/long/seed{seed}/ckpt.pt "
          "--train_events=8000 --max_steps=800")
arms = {name: f"--direction_loss={name}" for name in ("angular", "cosine", "vmf")}
learning_rates = "0.0005,0.001,0.002"
metric = "val_angle_mean"
seeds = 2
out_dir = "out/study/direction_loss"
