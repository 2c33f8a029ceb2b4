"""Compare variants: tune the learning rate of each, report on other seeds.

    python -m tools.sweep sample_config/sweep_labels.py      --dry_run=True only lists
    python -m tools.plot --what=sweep --results=out/sweep_labels/results.csv

Each variant runs with all learning rates on tuning_seeds, then with the
best one on seeds, which alone are reported. Writes out_dir/results.csv, a
row per finished run, and prints a table. The same command runs what is
missing. Sweeps of other variants may share out_dir.
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

import data
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
    return [f"{float(x):.15g}" for x in text.split(",")]

def read_csv(path):
    """Return the rows as dicts of text, [] if there is no file."""
    return list(csv.DictReader(open(path, newline=""))) if Path(path).exists() else []

def write_csv(path, rows):
    columns, text = dict.fromkeys(name for row in rows for name in row), io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    utils.write_atomic(path, lambda part: part.write_text(text.getvalue()))

def lock(folder):
    """Wait for other sweeps -> file; they wait until it is closed."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    file = open(f"{folder}/results.lock", "w")
    with contextlib.suppress(ImportError, OSError):  # Windows, some network disks
        import fcntl
        fcntl.flock(file, fcntl.LOCK_EX)
    return file

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

def check_variants(config, rows):
    """Refuse wrong options and changed ones -> {variant: options}."""
    Config = {"train": TrainConfig, "finetune": FinetuneConfig}[config.script]
    path = Path(config.out_dir) / "options.json"
    earlier = json.loads(path.read_text()) if path.exists() else {}
    for variant, text in config.variants.items():
        with contextlib.redirect_stdout(io.StringIO()):
            run = utils.load_config(Config, args=shlex.split(f"{config.base} {text}"))
        now = asdict(run)
        if Path(run.data_dir, "meta.json").exists():
            now["data_fingerprint"] = data.read_folder(run.data_dir)[0]["fingerprint"]
        has_row = any(row["variant"] == variant for row in rows)
        if not has_row and not list((path.parent / variant).glob("*/ckpt.pt")):
            earlier[variant] = now  # no run has begun
        old = earlier.get(variant, dict.fromkeys(now))  # None: unknown
        for name in sorted(now.keys() - {"device", "micro_batch_size", "compile"}):
            if old.get(name, now[name]) != now[name]:
                text = f"{name} = {old[name]!r}, not {now[name]!r}"
                utils.fail(f"{path}: {variant} ran with {text}; restore it, or use another out_dir")
    return earlier

def run_missing(config, rows, variant, rate, seeds, role):
    """Run the seeds that `rows` lacks, add a row for each: the last one of log.csv."""
    path = f"{config.out_dir}/results.csv"
    for seed in numbers(seeds):
        rows[:] = read_csv(path)  # other sweeps add some
        key = {"variant": variant, "learning_rate": rate, "seed": seed, "role": role}
        folder = Path(config.out_dir) / variant / f"lr{rate}_seed{seed}"
        text = f"{config.base} {config.variants[variant]}".replace("{seed}", seed)
        command = [sys.executable, f"{config.script}.py", *shlex.split(text),
                   f"--learning_rate={rate}", f"--seed={seed}", f"--out_dir={folder}"]
        if any(key.items() <= row.items() for row in rows):
            continue
        if config.dry_run:
            print(shlex.join(["python", *command[1:]]))
            continue
        with lock(config.out_dir):  # files may have changed
            options = check_variants(config, rows)
            utils.write_json(f"{config.out_dir}/options.json", options)
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / "output.txt", "w") as output:
            status = subprocess.run(command, stdout=output, stderr=output).returncode
        text = (folder / "output.txt").read_text()
        if status not in (0, 3) or "stopped at step" in text:
            utils.fail(f"{folder} ended with status {status}: {text.strip().splitlines()[-1]}")
        log = {row["step"]: row for row in read_csv(folder / "log.csv")}
        last = log.get(str(options[variant]["max_steps"]), {})
        last = {config.metric: "inf"} if status == 3 else last
        results = {name: x for name, x in last.items() if x not in ("", "nan")}
        if config.metric not in results:
            utils.fail(f"{folder}/log.csv: no {config.metric} at its end, only {[*results]}")
        results["data_fingerprint"] = options[variant].get("data_fingerprint")
        with lock(config.out_dir):
            rows[:] = [*read_csv(path), key | {"metric": config.metric} | results]
            write_csv(path, rows)
        print(*key.values(), config.metric, results[config.metric], flush=True)

def main():
    config = utils.load_config(SweepConfig, __doc__)
    rows, rates = read_csv(f"{config.out_dir}/results.csv"), numbers(config.rates)
    check_variants(config, rows)
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
