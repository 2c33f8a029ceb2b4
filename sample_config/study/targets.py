# What should the model say: weight of the charge, charge or centre from [CLS], cross-entropy or earth mover's
# distance? Charge with weight 1 and cross-entropy are positions of embedding.py.
arms = {"lambda_charge/0.1": "--lambda_charge=0.1", "lambda_charge/10": "--lambda_charge=10",
        "center": "sample_config/ablation/center.py",
        "charge_and_center": "sample_config/ablation/charge_and_center.py",
        "emd": "sample_config/ablation/emd.py", "ce_emd": "sample_config/ablation/ce_emd.py"}
learning_rates = "0.01,0.02,0.04"
metric = "val_loss"
seeds = 2
out_dir = "out/study/targets"
