# The published example (timinar/PolarBERT, May 2025), as near as it goes. Put after base.py.
use_dom_positions = False
final_norm = False
batch_size = 200
max_steps = 1_000_000  # 2 epochs of 100 M events
learning_rate = 3e-3
schedule = "cosine"  # there: one cycle
beta1 = 0.85
beta2 = 0.9998
adam_eps = 1e-7
weight_decay = 0.02  # there also of the DOM table and [CLS]
grad_clip = 2.0
