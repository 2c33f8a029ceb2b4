# As real_small.py, off by 30 % and with as many afterpulses as IceCube's clsim gives. Put after it.
out_dir = "data/real_large_raw"
seed = 5

scattering = 1.3
absorption = 1.3
dust = 1.3
efficiency = 0.7
noise = 1.3
afterpulses = 0.06
