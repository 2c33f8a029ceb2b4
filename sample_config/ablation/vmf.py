# Direction with its uncertainty: the length of the head's vector is the kappa of von Mises-Fisher.
# Put after a fine-tuning config; demo_finetune.py has it already.
direction_loss = "vmf"
