# The direction with its uncertainty: the length of the head's vector is the kappa of a von Mises-Fisher law.
# Put after a fine-tuning config; demo_finetune.py has it already.
direction_loss = "vmf"
