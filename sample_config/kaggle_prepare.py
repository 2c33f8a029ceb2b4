# The paper's splits of Kaggle's data (IceCube - Neutrinos in Deep Ice), equal to the defaults of
# prepare.py. Unpack the competition's files into data/kaggle first. "test": "test" would add the
# test set, which has no labels.
input_dir = "data/kaggle"
data_dir = "data/icecube"
# batches, both ends included
splits = {"pretrain": (1, 500), "finetune": (601, 605), "val": (651, 655)}
max_pulses = 127
seed = 0
