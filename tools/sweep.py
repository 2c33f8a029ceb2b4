"""Compare variants: tune the learning rate of each, report on other seeds.

    python -m tools.sweep sample_config/sweep_labels.py      --dry_run=True only lists
    python -m tools.plot --what=sweep --results=out/sweep_labels/results.csv

Each variant runs with all rates on tuning_seeds, then with the best on seeds,
which are reported. Run again, it runs what is missing.
"""
import utils  # before torch

import contextlib
import csv
import io
import json
import shlex
import subprocess
import sys
import zlib
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
    report: str = ""  # what these runs add, for example --val_split=final
    metric: str = "val_dom_loss"  # column of log.csv at the end; lower is better
    out_dir: str = ""  # runs and results.csv; "" = out/<names of the config files>
    dry_run: bool = False  # list the commands that remain, run nothing

def read_csv(path):
    """Return the rows as dicts of text, [] if there is no file."""
    return [*csv.DictReader(open(path, newline=""))] if Path(path).exists() else []

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

def values_of(rows, variant, role, column):
    """Return {learning rate: values of a column, one per seed}."""
    values = {}
    for row in rows:
        if (row["variant"], row["role"]) == (variant, role):
            value = float(row.get(column) or "inf")  # none if it diverged
            values.setdefault(row["learning_rate"], []).append(value)
    return values

def tuning(rows, variant, metric):
    """Return {learning rate: mean of the metric over the seeds that tune}."""
    values = values_of(rows, variant, "tune", metric)
    return {rate: np.mean(x) for rate, x in values.items()}

def reported(rows, variant, metric, column):
    """Return the best learning rate, and values of a column with it."""
    values = values_of(rows, variant, "report", column)
    means = tuning(rows, variant, metric)
    best = min(means, key=means.get) if means else [*values][-1]
    return best, values.get(best, [])

# ---- runs ---------------------------------------------------------------------------------------

def options_of(config, variant):
    """Return the options of a variant, and checksums of what it reads."""
    Config = {"train": TrainConfig, "finetune": FinetuneConfig}[config.script]
    found = {"report": config.report}
    for seed in filter(None, f"{config.seeds},{config.tuning_seeds},0".split(",")):
        args = shlex.split(f"{config.base} {config.variants[variant]}".replace("{seed}", seed))
        with contextlib.redirect_stdout(io.StringIO()):
            options = asdict(utils.load_config(Config, args=args))
        if Path(folder := options["data_dir"], "meta.json").exists():
            found[f"fingerprint_{seed}"] = data.read_folder(folder)[0]["fingerprint"]
        for name in "pretrained", "init_from":
            if Path(options.get(name, "")).is_file():
                found[f"{name}_{seed}"] = zlib.crc32(Path(options[name]).read_bytes())
    return options | found

def check_variants(config):
    """Refuse options that have changed -> {variant: options}."""
    folder = Path(config.out_dir)
    path, rows = folder / "options.json", read_csv(folder / "results.csv")
    earlier = json.loads(path.read_text()) if path.exists() else {}
    for variant in config.variants:
        now = options_of(config, variant)
        has_begun = any((folder / variant).glob("*/ckpt.pt"))
        if not has_begun and not any(row["variant"] == variant for row in rows):
            earlier[variant] = now
        old = earlier.get(variant, dict.fromkeys(now))  # None: unknown
        for name in sorted(now.keys() - {"device", "micro_batch_size", "compile"}):
            if old.get(name, now[name]) != now[name]:
                text = f"{variant} ran with {name} = {old[name]!r}, not {now[name]!r}"
                utils.fail(f"{path}: {text}; restore it, or use another out_dir")
    return earlier

def run_missing(config, variant, rate, seeds, role):
    """Run the seeds that results.csv lacks; add the last row of their log.csv."""
    path = f"{config.out_dir}/results.csv"
    for seed in seeds.split(","):
        key = {"variant": variant, "learning_rate": rate, "seed": seed, "role": role}
        if any(key.items() <= row.items() for row in read_csv(path)):
            continue
        folder = Path(config.out_dir) / variant / f"lr{rate}_seed{seed}"
        text = f"{config.base} {config.variants[variant]}".replace("{seed}", seed)
        text += f" {config.report}" * (role == "report")
        command = [sys.executable, f"{config.script}.py", *shlex.split(text),
                   f"--learning_rate={rate}", f"--seed={seed}", f"--out_dir={folder}"]
        if config.dry_run:
            print(shlex.join(["python", *command[1:]]))
            continue
        with lock(config.out_dir):  # files may have changed
            options = check_variants(config)
            utils.write_json(f"{config.out_dir}/options.json", options)
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / "output.txt", "w") as output, contextlib.ExitStack() as stack:
            process = subprocess.Popen(command, stdout=output, stderr=output)
            stack.callback(process.wait)  # after Ctrl-C it saves
            status = process.wait()
        if status not in (0, 3):
            lines = (folder / "output.txt").read_text().strip().splitlines()
            utils.fail(f"{folder} ended with status {status}: {lines[-1]}")
        log = {row["step"]: row for row in read_csv(folder / "log.csv")}
        last = log.get(str(options[variant]["max_steps"]), {})
        last = {config.metric: "inf"} if status == 3 else last  # diverged
        results = {name: x for name, x in last.items() if x not in ("", "nan")}
        if config.metric not in results:
            utils.fail(f"{folder}/log.csv: no {config.metric} at its end")
        with lock(config.out_dir):
            write_csv(path, [*read_csv(path), key | {"metric": config.metric} | results])
        print(*key.values(), config.metric, results[config.metric], flush=True)

def main():
    config = utils.load_config(SweepConfig, __doc__)
    path, rates = f"{config.out_dir}/results.csv", config.rates.split(",")
    if {*config.seeds.split(",")} & {*config.tuning_seeds.split(",")}:
        utils.fail(f"seeds = {config.seeds!r}: one of them tunes; report others")
    check_variants(config)
    for variant in config.variants:
        for rate in rates if len(rates) > 1 else ():
            run_missing(config, variant, rate, config.tuning_seeds, "tune")
        means = tuning(read_csv(path), variant, config.metric)
        best = min(means, key=means.get, default="BEST" if len(rates) > 1 else rates[0])
        tried = sorted(means, key=float)
        if best in tried[:1] + tried[-1:]:
            print(f"warning: {variant}: {best} is at the end of {', '.join(tried)}; add rates")
        run_missing(config, variant, best, config.seeds, "report")
    if config.dry_run:
        return
    print(f"| variant | learning rate | {config.metric} | n |\n|---|---|---|---|")
    for variant in config.variants:
        rate, x = reported(read_csv(path), variant, config.metric, config.metric)
        spread = f" +- {np.std(x, ddof=1):.2g}" if len(x) > 1 else ""
        print(f"| {variant} | {rate} | {np.mean(x):.4g}{spread} | {len(x)} |")

if __name__ == "__main__":
    utils.run_main(main)
