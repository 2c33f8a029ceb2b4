# How far does pretraining go with the events seen? One long run, 102,400 different events; labels.py and
# branches.py begin from it. To compare with: guessing gives ln 5160 = 8.549; guessing by how often each DOM
# is good (aux = False) in the training events gives 8.504:
#     python -c "
#     import numpy, data
#     pulses = [data.open_split('data/study', split).pulses for split in ('pretrain', 'val')]
#     train, val = [part['dom'][~part['aux']] for part in pulses]
#     share = numpy.bincount(train, minlength=5160) + 1.0
#     print(-numpy.log(share / share.sum())[val].mean())"
shared = ("sample_config/study/train.py --max_steps=3200 --cooldown_steps=800 --keep_every=400 "
          "--eval_interval=200")
arms = {"long": ""}
seeds = 2
out_dir = "out/study/pretrain"
