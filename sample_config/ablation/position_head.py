# DOM logits from where the DOMs are, instead of a vector per DOM. Put after a pretraining config.
dom_head = "position"
