#!/usr/bin/env bash
# The whole chain on a laptop: simulate, prepare, pretrain, fine-tune twice, train from scratch. Some
# 4 minutes on 2 cores, after the packages are installed. Run twice, it does little: each stage resumes.
set -euo pipefail
cd "$(dirname "$0")"
[ -d .venv ] || python3 -m venv .venv
. .venv/bin/activate
pip install -q -r requirements.txt

python simulate.py sample_config/demo_simulate.py
python prepare.py sample_config/demo_prepare.py
python train.py sample_config/demo.py
python finetune.py sample_config/demo_finetune.py
python finetune.py sample_config/demo_finetune.py sample_config/demo_500.py
python finetune.py sample_config/demo_finetune.py sample_config/demo_scratch.py

python - <<'END'
import json
print("\nmean angular error [rad] of 4,000 validation events:")
for run, text in (("demo_finetune", "8,000 labels after pretraining"),
                  ("demo_finetune+demo_500", "500 labels after pretraining"),
                  ("demo_finetune+demo_scratch", "8,000 labels from scratch, 4 times the steps")):
    row = json.load(open(f"out/{run}/evaluation_val.json"))["rows"][0]
    print(f"{text:<45} {row['mean']:.3f} +- {row['mean_error']:.3f}")
print(f"{'a line fit, no learning':<45} {row['line_fit_mean']:.3f}")
print(f"{'one direction for all events':<45} {row['guess_mean']:.3f}")
END
