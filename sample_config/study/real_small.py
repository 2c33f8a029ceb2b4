# Events that play the real data: ice and tubes off by what a simulation may well get wrong, 5 to 10 %, and
# one afterpulse per 100 photo-electrons, which the simulation (simulate.py beside this file) lacks. Chosen by
# us, not measured. For simulate.py; real_large.py is off by more.
out_dir = "data/real_small_raw"
n_events = 60_000
n_test_events = 0
seed = 4

scattering = 1.05
absorption = 1.1
dust = 1.1
efficiency = 0.95
noise = 1.1
afterpulses = 0.01
