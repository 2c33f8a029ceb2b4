# Train the head alone: how much of the direction is in [CLS] already? Put after a fine-tuning
# config.
freeze_backbone = True
