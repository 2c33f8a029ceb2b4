# Muon for the matrices of the backbone. Put after base.py; demo.py has it already. demo.py with learning_rate
# 2e-2, 350 steps, 175 of them cooldown: val_dom_loss 4.15 +- 0.06 instead of 4.64 +- 0.08 with AdamW at its
# best learning rate, 2e-2 too (seeds 1 to 3, CPU, float32).
optimizer = "muon"
