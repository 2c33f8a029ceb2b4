# Events of another detector in the same ice, sparser than IceCube along its strings and denser across: 121
# strings of 18 DOMs, 90 m and 36 m apart, ARCA's spacing. For simulate.py; first write its table:
#     python -c "
#     import numpy as np
#     i, j = np.meshgrid(np.arange(-8, 9), np.arange(-8, 9))
#     x, y = 90 * (i + j / 2).ravel(), 90 * 0.75 ** 0.5 * j.ravel()
#     near = np.hypot(x, y) < 525
#     x, y = np.repeat(x[near], 18), np.repeat(y[near], 18)
#     z = np.tile(306 - 36.0 * np.arange(18), near.sum())
#     rows = np.stack([np.arange(len(x)), x, y, z, np.arange(len(x)) // 18], 1)
#     np.savetxt('data/other_detector.csv', rows, '%g', ',', header='sensor_id,x,y,z,string', comments='')"
geometry = "data/other_detector.csv"
out_dir = "data/other_raw"
n_events = 60_000
events_per_batch = 10_000
n_test_events = 0
seed = 3
