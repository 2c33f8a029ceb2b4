# The direction from 2,000 labels after the best runs of scaling.py: of four lengths, and of four widths.
script = "finetune.py"
shared = ("sample_config/study/finetune.py --data_dir=data/large --direction_loss=vmf --batch_size=64 "
          "--max_steps=200 --val_events=2000")
arms = {f"muP/64/{n}": f"--pretrained=out/study/scaling/muP/64/{n}/seed{{seed}}/ckpt.pt"
        for n in (25600, 51200, 102400, 204800)}
arms = arms | {f"{arm}/102400": f"--pretrained=out/study/scaling/{arm}/102400/seed{{seed}}/ckpt.pt "
               f"--embedding_dim={width} --dom_embed_dim={width // 2} --hidden_size={4 * width} "
               f"--num_heads={width // 32}"
               for arm, width in (("standard/32", 32), ("muP/128", 128), ("muP/256", 256))}
learning_rates = "0.0005,0.001,0.002"
widen = 1
metric = "val_angle_mean"
report = "report"
wide = "report_angle_mean"
out_dir = "out/study/scaling_labels"
