# muP: carries a learning rate tuned at width 256 to 512. Put after base.py; after demo.py adamw.py first.
mup_base_width = 256
embedding_dim = 512
dom_embed_dim = 256
hidden_size = 2048
