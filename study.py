"""Run a study: several arms, each with its own best learning rate, over several seeds. All results go into one .csv file.

    python simulate.py sample_config/study/simulate.py                     the data of all studies, once
    python prepare.py sample_config/study/prepare.py
    python study.py sample_config/study/embedding.py --jobs=2              one study, two runs at a time, each on half of the cores
    python plot.py --what=study --study=embedding --x=learning_rate        a picture of it

An arm is a name and what it adds to the command that all arms share. Each is run with every learning rate on seed 1; while
the best of them lies at an end of the range, the range grows; the other seeds are run with the best. Prints the means and
standard deviations over seeds as a table. The best run of an arm is kept as out_dir/<arm>/seed<seed>, where the arms of a
later study find it. A study that was stopped goes on: what is in the results is not run again.
"""
import common

import csv
import os
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

METRICS = ["val_loss", "val_dom_loss", "val_charge_loss", "val_perplexity", "val_top1", "val_top5", "val_string", "val_distance",
           "val_charge_rms", "val_center_rms", "val_angle_mean", "val_angle_median", "coverage_50", "coverage_90"]
RESULTS = ["study", "arm", "learning_rate", "seed", "step", "events", "events_per_s", "parameters", *METRICS, "arguments", "hardware"]


@dataclass
class StudyConfig:
    script: str = "train.py"  # or "finetune.py"
    shared: str = "sample_config/study/train.py"  # arguments that all arms share, separated by spaces
    arms: dict = field(default_factory=dict)  # name to its own arguments, in which {seed} stands for the run's seed
    learning_rates: str = "0.005,0.01,0.02"  # tried on seed 1, separated by commas; a single one is not tuned
    widen: int = 2  # so often the range may grow
    seeds: int = 3  # seeds 1 to this number
    metric: str = "val_dom_loss"  # the lower the better: it decides on the learning rate
    out_dir: str = ""  # where runs are kept; its last part is the study's name in the results
    results: str = "out/study/results.csv"  # file that all studies share
    jobs: int = 1  # runs at a time, which share the cores

    def check(self):
        yield from common.check_choice(self, "script", ("train.py", "finetune.py"))
        yield from common.check_choice(self, "metric", METRICS)
        yield from common.check_positive(self, "seeds", "jobs")
        yield from common.check_not_negative(self, "widen")
        if not self.arms:
            yield "arms is empty; name a study, for example sample_config/study/embedding.py"
        try:
            rates = [float(rate) for rate in self.learning_rates.split(",")]
        except ValueError:
            rates = []
        if not rates or min(rates) <= 0 or len(rates) == 2:
            yield f"learning_rates = {self.learning_rates!r}: one (not tuned), or three and more numbers, separated by commas"


# ----------------------------------------------------------------------------------------------------------------------
# the file of results
# ----------------------------------------------------------------------------------------------------------------------

def read_results(path):
    """The rows of a results file as dicts of strings, one for each evaluation of each run; [] if there is no file."""
    if not os.path.isfile(path):
        return []
    with open(path, newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        rows = list(reader)
    if reader.fieldnames != RESULTS or any(None in (*row, *row.values()) for row in rows):
        common.fail(f"{path}: not a file of results of this version; choose another one with --results=")
    return rows


def write_results(path, rows):
    def write(part):
        with open(part, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, RESULTS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
    common.write_atomic(path, write)


def final_rows(rows, study):
    """The last evaluation of each run of a study -> dict (arm, learning rate, seed) to row."""
    rows = sorted((row for row in rows if row["study"] == study), key=lambda row: int(row["step"]))
    return {(row["arm"], float(row["learning_rate"]), int(row["seed"])): row for row in rows}


def value(row, column):
    return float(row[column] or "nan")


def best_rate(final, arm, metric):
    """The learning rate with which seed 1 ended lowest; a run that diverged counts as infinitely high."""
    ends = {rate: np.nan_to_num(value(row, metric), nan=np.inf) for (name, rate, seed), row in final.items()
            if (name, seed) == (arm, 1)}
    return min(ends, key=ends.get)


# ----------------------------------------------------------------------------------------------------------------------
# runs
# ----------------------------------------------------------------------------------------------------------------------

def missing_runs(config, final):
    """The runs (arm, learning rate, seed) that can be started now: first the tuning of all arms, then the other seeds."""
    rates = [float(rate) for rate in config.learning_rates.split(",")]
    tuning = [(arm, rate, 1) for arm in config.arms for rate in rates if (arm, rate, 1) not in final]
    if tuning:
        return tuning
    jobs = []
    for arm in config.arms:
        tried = sorted(rate for name, rate, seed in final if (name, seed) == (arm, 1))
        best = best_rate(final, arm, config.metric)
        if best in (tried[0], tried[-1]) and 1 < len(tried) < len(rates) + config.widen:
            neighbour = tried[1] if best == tried[0] else tried[-2]
            jobs.append((arm, float(f"{best * best / neighbour:g}"), 1))
        else:
            jobs += [(arm, best, seed) for seed in range(2, config.seeds + 1)]
    return [job for job in jobs if job not in final]


def folder_of(config, arm, rate, seed):
    return Path(config.out_dir) / arm / f"lr{rate:g}_seed{seed}"


def arguments_of(config, arm, seed):
    return f"{config.shared} {config.arms[arm]}".replace("{seed}", str(seed)).strip()


def run(config, arm, rate, seed):
    """Call the script for one run -> its rows of results. A run that diverges has one row, at step 0, without numbers."""
    folder = folder_of(config, arm, rate, seed)
    folder.mkdir(parents=True, exist_ok=True)
    arguments = arguments_of(config, arm, seed)
    command = [sys.executable, config.script, *shlex.split(arguments), f"--learning_rate={rate}", f"--seed={seed}", f"--out_dir={folder}"]
    threads = str(max((os.cpu_count() or 1) // config.jobs, 1))
    with open(folder / "output.txt", "a", encoding="utf-8") as output:  # behind what it said before it was stopped
        status = subprocess.run(command, stdout=output, stderr=subprocess.STDOUT, check=False,
                                env={**os.environ, "OMP_NUM_THREADS": threads}).returncode
    says = (folder / "output.txt").read_text(encoding="utf-8").splitlines()
    row = dict.fromkeys(RESULTS, "") | {"study": Path(config.out_dir).name, "arm": arm, "learning_rate": f"{rate:g}",
                                        "seed": str(seed), "arguments": arguments}
    if status:
        error = next((line for line in reversed(says) if line.startswith("error: ")), f"see {folder}/output.txt")
        if "smaller learning_rate" in error or "lower learning_rate" in error:
            return [row | {"step": "0"}]
        common.fail(f"{shlex.join(command)} ended with status {status}; {error}")

    row["hardware"] = next(line.partition(" | ")[2] for line in reversed(says) if line.startswith("run ") and " | commit " in line)
    model = common.load_checkpoint(folder / "ckpt.pt")["model"]
    row["parameters"] = str(sum(weight.numel() for name, weight in model.items() if not name.endswith("geometry")))
    with open(folder / "log.csv", newline="", encoding="utf-8") as file:
        log = list(csv.DictReader(file))
    row["events_per_s"] = f"{np.median([float(line['events_per_s']) for line in log if line['events_per_s']]):.4g}"
    rows = [row | {key: line[key] for key in ("step", "events", *METRICS) if key in line} for line in log
            if line["val_loss"] and line["step"] != "0"]
    evaluation = folder / "evaluation_val.json"
    if evaluation.exists() and "calibration" in (found := common.read_json(evaluation)):
        for level in (50, 90):
            share = np.interp(level / 100, found["calibration"]["level"], found["calibration"]["inside"])
            rows[-1][f"coverage_{level}"] = f"{share:.4f}"
    return rows


def table(config, final):
    """The arms side by side, as markdown: mean and standard deviation over seeds with the best learning rate."""
    best = {arm: best_rate(final, arm, config.metric) for arm in config.arms}
    runs = {arm: [row for (name, rate, _), row in final.items() if (name, rate) == (arm, best[arm])] for arm in config.arms}
    shown = [metric for metric in METRICS if any(value(row, metric) == value(row, metric) for arm in runs for row in runs[arm])]
    yield "| " + " | ".join(["arm", "learning rate", "seeds", *shown]) + " |"
    yield "|---" * (len(shown) + 3) + "|"
    for arm, rows in runs.items():
        numbers = np.array([[value(row, metric) for metric in shown] for row in rows])
        cells = [f"{mean:.4g} +- {spread:.2g}" if len(rows) > 1 else f"{mean:.4g}"
                 for mean, spread in zip(numbers.mean(0), numbers.std(0, ddof=min(len(rows) - 1, 1)))]
        yield "| " + " | ".join([arm, f"{best[arm]:g}", str(len(rows)), *cells]) + " |"


# ----------------------------------------------------------------------------------------------------------------------

def main():
    config = common.load_config(StudyConfig, __doc__)
    study = Path(config.out_dir).name
    rows = read_results(config.results)
    for (arm, _, seed), row in final_rows(rows, study).items():
        if arm in config.arms and row["arguments"] != arguments_of(config, arm, seed):
            common.fail(f"{config.results}: arm {arm} of {study} was run with {row['arguments']}, now it would be "
                        f"{arguments_of(config, arm, seed)}; set it back, or choose another out_dir")
    while jobs := missing_runs(config, final_rows(rows, study)):
        with common.progress_bar(len(jobs), f"study {study}", "run") as bar, ThreadPoolExecutor(config.jobs) as pool:
            try:
                for future in as_completed([pool.submit(run, config, *job) for job in jobs]):
                    rows += future.result()
                    write_results(config.results, rows)
                    last = rows[-1]
                    bar.write(f"run {study} | {last['arm']} | lr {last['learning_rate']} seed {last['seed']} | "
                              f"{config.metric} {last[config.metric] or 'diverged'}")
                    bar.update()
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
    final = final_rows(read_results(config.results), study)
    for arm in config.arms:
        for seed in range(1, config.seeds + 1):
            folder, best = folder_of(config, arm, best_rate(final, arm, config.metric), seed), Path(config.out_dir) / arm / f"seed{seed}"
            if folder.exists() and not best.exists():
                shutil.copytree(folder, best)
    print(*table(config, final), sep="\n")


if __name__ == "__main__":
    common.run_stage(main)
