# CompleteP: carries a learning rate tuned at 8 layers to 24. Put after base.py; after demo.py adamw.py first.
mup_base_layers = 8
num_layers = 24
