# muP: carries a learning rate tuned at width 256 to 512. Made for AdamW. Put after base.py, or
# after demo.py and adamw.py.
mup_base_width = 256
embedding_dim = 512
dom_embed_dim = 256
hidden_size = 2048
