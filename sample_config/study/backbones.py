# GRU and Mamba in the place of attention, 0.15 M parameters in three layers; the transformer is
# trapezoidal/800 of schedule.py.
shared = ("sample_config/study/train.py --batch_size=64 --max_steps=800 --cooldown_steps=400 "
          "--cls_target=charge+motion --dom_head=position")
arms = {"gru/800": "sample_config/ablation/gru.py", "mamba/800": "sample_config/ablation/mamba.py"}
learning_rates = "0.0025,0.005,0.01"
widen = 1
out_dir = "out/study/backbones"
