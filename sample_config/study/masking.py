# What share of the pulses to hide? The DOM losses count other pulses, see transfer.py for what it means for the direction.
arms = {f"mask_prob/{share}": f"--mask_prob={share}" for share in (0.1, 0.25, 0.5, 0.75)}
out_dir = "out/study/masking"
