# The paper's splits of the Kaggle data (IceCube - Neutrinos in Deep Ice), spelled out; equal to the defaults
# of prepare.py. Unpack the competition's files into data/kaggle first. Add "test": "test" to prepare the
# unlabelled test set as well.
input_dir = "data/kaggle"
data_dir = "data/icecube"
splits = {"pretrain": (1, 500), "finetune": (601, 605), "val": (651, 655)}  # batches, both ends included
max_pulses = 127
seed = 0
