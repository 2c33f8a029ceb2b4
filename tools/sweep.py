"""Compare variants: tune the learning rate of each on some seeds, report it
on others.

    python -m tools.sweep sample_config/sweep_labels.py      --dry_run=True only lists
    python -m tools.plot --what=sweep --results=out/sweep_labels/results.csv

Each variant runs with all learning rates on tuning_seeds, then with the
best one on seeds, which alone are reported. Writes out_dir/results.csv, a
row per finished run, and prints a table. The same command runs what is
missing.
"""
import utils  # first: it sets how torch's threads wait

import contextlib
import csv
import io
import json
import shlex
import subprocess
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np

from finetune import FinetuneConfig
from train import TrainConfig

@dataclass
class SweepConfig:
    script: Literal["train", "finetune"] = "train"  # what to run
    base: str = "sample_config/demo.py"  # files and --options; {seed} is the seed
    variants: dict = field(default_factory=lambda: {"base": ""})  # name: what it adds
    rates: str = "0.005,0.01,0.02"  # learning rates; a single one is not tuned
    tuning_seeds: str = "0"  # seeds that choose the rate
    seeds: str = "1,2,3"  # seeds that are reported
    metric: str = "val_dom_loss"  # column of log.csv at the end; lower is better
    out_dir: str = ""  # runs and results.csv; "" = out/<names of the config files>
    dry_run: bool = False  # list the commands that remain, run nothing

    def check(self):
        if set(numbers(self.seeds)) & set(numbers(self.tuning_seeds)):
            utils.fail(f"seeds = {self.seeds!r}: one of them tunes the rate; report others")

def numbers(text):
    return [f"{float(x):g}" for x in text.split(",")]

def read_csv(path):
    """Return the rows as dicts of text, [] if there is no file."""
    return list(csv.DictReader(open(path, newline=""))) if Path(path).exists() else []

def write_csv(path, rows):
    def write(part):
        with open(part, "w", newline="") as file:
            writer = csv.DictWriter(file, dict.fromkeys(name for row in rows for name in row))
            writer.writeheader()
            writer.writerows(rows)
    utils.write_atomic(path, write)

def number(row, column):
    return float(row.get(column) or "inf")  # a run that diverged has none

def select(rows, variant, role):
    return [row for row in rows if (row["variant"], row["role"]) == (variant, role)]

def tuning(rows, variant, metric):
    """Return {learning rate: mean of the metric over the seeds that tune}."""
    values = {}
    for row in select(rows, variant, "tune"):
        values.setdefault(row["learning_rate"], []).append(number(row, metric))
    return {rate: np.mean(x) for rate, x in values.items()}

def reported(rows, variant, metric):
    """Return the rows that report a variant with its best learning rate."""
    runs, means = select(rows, variant, "report"), tuning(rows, variant, metric)
    best = min(means, key=means.get) if means else runs[-1]["learning_rate"]
    return [row for row in runs if row["learning_rate"] == best]

def print_table(rows, variants, metric):
    """Print mean and standard deviation over seeds as markdown."""
    print(f"| variant | learning rate | {metric} | n |\n|---|---|---|---|")
    for variant in variants:
        runs = reported(rows, variant, metric)
        x = np.array([number(row, metric) for row in runs])
        spread = f" +- {x.std(ddof=1):.2g}" if len(x) > 1 else ""
        print(f"| {variant} | {runs[0]['learning_rate']} | {x.mean():.4g}{spread} | {len(x)} |")

# ---- runs ---------------------------------------------------------------------------------------

def check_variants(config):
    """Refuse wrong options before the first run, and earlier runs with other ones than now."""
    Config = {"train": TrainConfig, "finetune": FinetuneConfig}[config.script]
    path = Path(config.out_dir) / "options.json"
    earlier = json.loads(path.read_text()) if path.exists() else {}
    for variant, text in config.variants.items():
        with contextlib.redirect_stdout(io.StringIO()):
            run = utils.load_config(Config, args=shlex.split(f"{config.base} {text}"))
        if not list((path.parent / variant).glob("*/ckpt.pt")):
            earlier.pop(variant, None)  # no run has begun
        for name, old in earlier.setdefault(variant, asdict(run)).items():
            now = getattr(run, name)
            if old != now and name not in ("device", "micro_batch_size", "compile"):
                utils.fail(f"{path}: {variant} has run with {name} = {old!r}, not {now!r}; "
                           "restore it, or choose another out_dir")
    if not config.dry_run:
        utils.write_json(path, earlier)

def run_missing(config, rows, variant, rate, seeds, role):
    """Run the seeds that `rows` lacks, add a row for each: the last one of log.csv."""
    for seed in numbers(seeds):
        key = {"variant": variant, "learning_rate": rate, "seed": seed, "role": role}
        folder = Path(config.out_dir) / variant / f"lr{rate}_seed{seed}"
        options = f"{config.base} {config.variants[variant]}".replace("{seed}", seed)
        command = [sys.executable, f"{config.script}.py", *shlex.split(options),
                   f"--learning_rate={rate}", f"--seed={seed}", f"--out_dir={folder}"]
        if any(key.items() <= row.items() for row in rows):
            continue
        if config.dry_run:
            print(shlex.join(["python", *command[1:]]))
            continue
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / "output.txt", "w") as output:
            status = subprocess.run(command, stdout=output, stderr=output).returncode
        text = (folder / "output.txt").read_text()
        if status not in (0, 3) or "stopped at step" in text:
            utils.fail(f"{folder} ended with status {status}: {text.strip().splitlines()[-1]}")
        results = {config.metric: "inf"} if status == 3 else read_csv(folder / "log.csv")[-1]
        if config.metric not in results:
            utils.fail(f"{folder}/log.csv has no {config.metric}; it has {', '.join(results)}")
        rows.append(key | {"metric": config.metric} | results)
        write_csv(f"{config.out_dir}/results.csv", rows)
        print(*key.values(), config.metric, results[config.metric], flush=True)

def main():
    config = utils.load_config(SweepConfig, __doc__)
    check_variants(config)
    rows, rates = read_csv(f"{config.out_dir}/results.csv"), numbers(config.rates)
    for variant in config.variants:
        for rate in rates if len(rates) > 1 else ():
            run_missing(config, rows, variant, rate, config.tuning_seeds, "tune")
        means = tuning(rows, variant, config.metric)
        best = min(means, key=means.get, default="BEST" if len(rates) > 1 else rates[0])
        tried = sorted(means, key=float)
        if best in tried[:1] + tried[-1:]:
            print(f"warning: {variant}: {best} is at the end of {', '.join(tried)}; add rates")
        run_missing(config, rows, variant, best, config.seeds, "report")
    if not config.dry_run:
        print_table(rows, config.variants, config.metric)

if __name__ == "__main__":
    utils.run_main(main)
