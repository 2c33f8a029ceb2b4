# Do losses follow power laws in parameters and events, with muP and without? AdamW, as muP is for it; each
# arm sees its events once. data/large:
#     python simulate.py sample_config/study/simulate.py --n_events=250_000 --out_dir=data/large_raw
#     python prepare.py sample_config/study/prepare.py --input_dir=data/large_raw --data_dir=data/large \
#         "--splits={'pretrain': (1, 21), 'finetune': (22, 23), 'val': (24, 24), 'report': (25, 25)}"
# Made for a GPU; the widest runs take hours on a CPU.
shared = ("sample_config/study/train.py --data_dir=data/large --val_events=10_000 --batch_size=256 "
          "--optimizer=adamw --cls_target=charge+motion --dom_head=position")
arms = {f"{name}/{width}/{256 * steps}": f"--embedding_dim={width} --dom_embed_dim={width // 2} "
        f"--hidden_size={width * 4} --num_heads={width // 32} --mup_base_width={base} "
        f"--mup_base_heads={base // 32} --max_steps={steps} --cooldown_steps={steps // 2}"
        for name, base, widths in (("standard", 0, {32: 800, 64: 800, 128: 800, 256: 200}),
                                   ("muP", 32, {64: 800, 128: 800, 256: 800}))
        for width, longest in widths.items() for steps in (800, 400, 200, 100) if steps <= longest}
learning_rates = "0.004,0.008,0.016"
widen = 2
out_dir = "out/study/scaling"
