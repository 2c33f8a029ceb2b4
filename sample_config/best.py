# Our recipe. Put after base.py; demo.py has it already. [CLS] also learns a line fit, a first guess
# of the direction that needs no label. Strings are masked as a whole. The DOM head knows where DOMs
# are. Tried on small models and toy events alone (docs/studies.md). prepare.py --keep=brightest goes
# with it.
cls_target = "charge+line_fit"  # 500 labels: 1.13 rad, after the charge alone 1.42 (study cls)
mask_unit = "string"  # 2,000 labels: 1.02 rad, pulses 1.035 (study masking)
dom_head = "position"  # val_dom_loss 3.65 instead of 5.00 (study cls)
optimizer = "muon"
learning_rate = 2.5e-3  # 1e-2 at 64 wide, times 64 / 256: not tuned at this size
cooldown_steps = 63_500  # half, as in demo.py
