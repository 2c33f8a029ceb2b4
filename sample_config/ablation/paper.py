# The paper's target of [CLS], DOM head and attention instead of best.py's. Put after demo.py.
cls_target = "charge"
dom_head = "linear"
qk_norm = False
