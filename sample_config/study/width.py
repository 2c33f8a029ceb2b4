# Does the best learning rate stay where it is when the width grows? AdamW in standard parametrisation and in
# muP, whose base is 64. Against the size of the model:
#     python -m tools.plot --what=study --study=width --x=parameters --fit=True
arms = {f"{name}/{width}": f"--optimizer=adamw --embedding_dim={width} --dom_embed_dim={width // 2} "
                           f"--hidden_size={width * 4} --num_heads={width // 32} --mup_base_width={base} "
                           f"--mup_base_heads={base // 32}"
        for name, base in (("standard", 0), ("muP", 64)) for width in (32, 64, 128)}
learning_rates = "0.0025,0.005,0.01,0.02"
seeds = 2
out_dir = "out/study/width"
