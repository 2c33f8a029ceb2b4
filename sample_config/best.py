# Our recipe. Put after base.py; demo.py has it already. [CLS] also learns a line fit, a first guess
# of the direction that needs no label. Strings are masked as a whole. The DOM head knows where DOMs
# are. Tried on small models and toy events alone (docs/studies.md). Goes with prepare.py
# --keep=brightest.
cls_target = "charge+line_fit"  # 2,000 labels: 1.01 rad, the charge alone 1.06 (study targets)
mask_unit = "string"  # 2,000 labels: 1.01 rad, pulses 1.04 (study targets)
dom_head = "position"  # 2,000 labels: 1.01 rad, a vector per DOM 1.07 (study ideas)
optimizer = "muon"
learning_rate = 2.5e-3  # 1e-2 at 64 wide, times 64 / 256: not tuned at this size
cooldown_steps = 63_500  # half, as in demo.py
