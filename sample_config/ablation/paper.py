# The paper's target of [CLS] and DOM head instead of best.py's. Put after demo.py.
cls_target = "charge"
dom_head = "linear"
