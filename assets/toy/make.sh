#!/usr/bin/env bash
# Makes the files of this folder again, in some 10 minutes on 2 cores: bash assets/toy/make.sh
set -euo pipefail
cd "$(dirname "$0")/../.."

# the model: 100,000 toy events without labels, then 8,000 labels, as in docs/studies.md
python simulate.py sample_config/study/simulate.py
python prepare.py sample_config/study/prepare.py
python train.py sample_config/demo.py sample_config/study/pretrain.py --dtype=float32 --out_dir=out/toy
python finetune.py sample_config/demo_finetune.py --data_dir=data/study --dtype=float32 \
    --pretrained=out/toy/ckpt.pt --learning_rate=5e-4 --max_steps=600 --eval_interval=600 \
    --train_events=8000 --val_events=2000 --out_dir=out/toy_direction

# 200 events that no model has seen
python simulate.py --out_dir=data/toy_raw --n_events=200 --events_per_batch=200 --n_test_events=0 --seed=3
python prepare.py --input_dir=data/toy_raw --data_dir=data/toy --max_pulses=64 --keep=brightest \
    "--splits={'val': (1, 1)}"
cp data/toy/*.bin assets/toy
sed 's|"input_dir": .*|"input_dir": "",|' data/toy/meta.json > assets/toy/meta.json

# weights alone: no optimizer, and where the 200 events are
python - <<'END'
import torch
for run, name in ("toy", "pretrained"), ("toy_direction", "direction"):
    checkpoint = torch.load(f"out/{run}/ckpt.pt", weights_only=True)
    checkpoint |= {"optimizer": [], "scaler": {}}
    checkpoint["config"] |= {"data_dir": "assets/toy", "val_split": "val", "dtype": "auto"}
    torch.save(checkpoint, f"assets/toy/{name}.pt")
END
