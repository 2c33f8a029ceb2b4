# DOM logits from where the DOMs are, instead of a vector per DOM. Put after base.py; demo.py
# has it already.
dom_head = "position"
