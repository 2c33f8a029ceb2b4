# Muon for the matrices of the backbone. Behind demo.py: see below.
optimizer = "muon"
