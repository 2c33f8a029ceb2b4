# Does the best learning rate stay where it is when the width grows? AdamW in standard parametrisation and in muP, tuned at
# width 64, where both are the same.
arms = {f"{name}/{width}": f"--optimizer=adamw --embedding_dim={width} --dom_embed_dim={width // 2} --hidden_size={width * 4} "
                           f"--num_heads={width // 32} --mup_base_width={base}"
        for name, base, widths in (("standard", 0, (32, 64, 128)), ("muP", 64, (32, 128))) for width in widths}
learning_rates = "0.0025,0.005,0.01,0.02"
seeds = 2
out_dir = "out/study/width"
