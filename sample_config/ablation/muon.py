# Muon for the matrices of the backbone. Put after base.py; demo.py has it already. On an older demo
# (docs/studies.md, the older round), 350 steps: val_dom_loss 4.15 +- 0.06 instead of 4.64 +- 0.08 with AdamW.
optimizer = "muon"
