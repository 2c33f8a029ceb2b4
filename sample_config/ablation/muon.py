# Muon for the matrices of the blocks. Put after base.py; demo.py has it already.
optimizer = "muon"
