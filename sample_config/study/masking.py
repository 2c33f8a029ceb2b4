# What share of the pulses to hide? 0.25 is positions of embedding.py. The DOM losses count other pulses, see
# transfer.py for what it means for the direction.
arms = {f"mask_prob/{share}": f"--mask_prob={share}" for share in (0.1, 0.5, 0.75)}
learning_rates = "0.01,0.02,0.04"
seeds = 2
out_dir = "out/study/masking"
