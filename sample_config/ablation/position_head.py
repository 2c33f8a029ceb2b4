# DOM logits from where the DOMs are, instead of a weight vector per DOM. Put after a pretraining config.
dom_head = "position"
