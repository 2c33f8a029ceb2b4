# The two arms of scaling.py whose best learning rate lay below its range.
shared = ("sample_config/study/train.py --data_dir=data/large --val_events=10_000 --batch_size=256 "
          "--optimizer=adamw --cls_target=charge+motion --dom_head=position")
arms = {f"standard/256/{256 * steps}": "--embedding_dim=256 --dom_embed_dim=128 --hidden_size=1024 "
        "--num_heads=8 --mup_base_width=0 --mup_base_heads=0 "
        f"--max_steps={steps} --cooldown_steps={steps // 2}"
        for steps in (800, 400)}
learning_rates = "0.0005,0.001,0.002,0.004,0.008,0.016"
widen = 0
seeds = 3
out_dir = "out/study/scaling_wide"
