# Splits of the Kaggle data (IceCube - Neutrinos in Deep Ice). These are the defaults of prepare.py.
# Unpack the competition's files into data/kaggle first. "test": "test" adds the test set, which has
# no labels.
input_dir = "data/kaggle"
data_dir = "data/icecube"
splits = {"pretrain": (1, 500), "finetune": (601, 605), "val": (651, 655)}  # first, last batch
max_pulses = 127
seed = 0
