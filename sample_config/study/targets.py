# What should the model say: weight of the charge, charge or centre from [CLS], cross-entropy or earth mover's distance?
arms = {"lambda_charge/0.1": "--lambda_charge=0.1", "lambda_charge/1": "", "lambda_charge/10": "--lambda_charge=10",
        "center": "sample_config/center.py", "charge_and_center": "sample_config/charge_and_center.py",
        "emd": "sample_config/emd.py", "ce_emd": "sample_config/ce_emd.py", "per_pulse": "sample_config/per_pulse.py"}
metric = "val_loss"
out_dir = "out/study/targets"
