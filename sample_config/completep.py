# CompleteP: carries a learning rate tuned at 8 layers to 24. Behind base.py.
mup_base_layers = 8
num_layers = 24
