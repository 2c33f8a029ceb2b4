#!/usr/bin/env bash
# One row of docs/speedrun.md, from three seeds: bash sample_config/study/speedrun.sh
# Options for the pretraining go behind it. Needs data/study (simulate.py and prepare.py here).
set -euo pipefail
cd "$(dirname "$0")/../.."
[ ! -e out/speedrun ] || { echo "out/speedrun is there: move it away" >&2; exit 1; }
for seed in 1 2 3; do
    python train.py sample_config/demo.py sample_config/study/pretrain.py --seed=$seed \
        --eval_interval=1560 --out_dir=out/speedrun/$seed "$@"
    python finetune.py sample_config/demo_finetune.py --data_dir=data/study --seed=$seed \
        --pretrained=out/speedrun/$seed/ckpt.pt --train_events=2000 --train_start=${seed}0000 \
        --max_steps=300 --eval_interval=300 --val_split=final --val_events=5000 \
        --out_dir=out/speedrun/${seed}_direction
done
python - <<'END'
import csv
seconds, angles = 0, []
for seed in "123":
    for run in seed, f"{seed}_direction":
        *_, last = csv.DictReader(open(f"out/speedrun/{run}/log.csv"))
        seconds += float(last["seconds"]) / 3
    angles.append(float(last["val_angle_mean"]))
mean = sum(angles) / 3
error = (sum((x - mean) ** 2 for x in angles) / 6) ** 0.5  # of the mean
t = (1.04 - mean) / error
print(f"| {seconds:.0f} | {', '.join(f'{x:.3f}' for x in angles)} | t = {t:.1f}, needed: 2.92 |")
END
