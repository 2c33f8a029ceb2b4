"""Run a study: several arms, each with its own best learning rate, over several seeds, into one .csv file.

    python simulate.py sample_config/study/simulate.py                     the data of most studies, once
    python prepare.py sample_config/study/prepare.py
    python -m tools.study sample_config/study/cls.py --jobs=2      one study, two runs at a time
    python -m tools.plot --what=study --study=cls --x=learning_rate        a picture of it

An arm is a name and what it adds to the command that all arms share. Each is run with every learning rate on
seed 1; while the best of them lies at an end of the range, the range grows, `widen` times at most; the other
seeds are run with the best. Prints the means and standard deviations over seeds as a table. An arm's runs
with its best learning rate are copied to out_dir/<arm>/seed<seed>, where the arms of a later study find them.
A study that was stopped goes on: what is in the results is not run again.
"""
import common  # first: it sets how torch's threads wait

import csv
import json
import math
import os
import shlex
import shutil
import subprocess
import sys
import zlib
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import numpy as np

import data
import finetune
import knobs
import train
from tasks import TASKS

METRICS = ["val_loss", "val_dom_loss", "val_charge_loss", "val_center_loss", "val_perplexity", "val_top1",
           "val_top5", "val_string", "val_distance", "val_charge_rms", "val_center_rms", "val_motion_angle",
           *(column for task in TASKS.values() for column in task.log), "coverage_50", "coverage_90",
           *(column.replace("val_", "report_") for task in TASKS.values() for column in task.log)]
# one row for each evaluation of each run; coverage is of the events reported; metric decided on the learning
# rate; knobs is knobs_of() the run
RESULTS = ["study", "arm", "learning_rate", "seed", "step", "events", "events_per_s", "parameters", *METRICS,
           "metric", "arguments", "knobs", "hardware"]

COMPUTING = {"micro_batch_size", "device", "compile"}  # knobs that change no result
CONFIGS = {"train.py": train.TrainConfig, "finetune.py": finetune.FinetuneConfig}


@dataclass
class StudyConfig:
    script: str = "train.py"  # or "finetune.py"
    shared: str = "sample_config/study/train.py"  # arguments that all arms share, separated by spaces
    arms: dict = field(default_factory=dict)  # name to its own arguments; {seed} stands for the seed
    learning_rates: str = "0.005,0.01,0.02"  # tried on seed 1, separated by commas; a single one is not tuned
    widen: int = 2  # so often the range may grow
    seeds: int = 3  # seeds 1 to this number
    metric: str = "val_dom_loss"  # the lower the better: it decides on the learning rate
    report: str = ""  # finetune.py: a split that tunes nothing; what is found there is report_...; "" = none
    wide: str = ""  # a metric: print it alone, arms that differ after the last / side by side
    out_dir: str = ""  # where runs are kept; its last part is the study's name in the results
    results: str = "out/study/results.csv"  # file that all studies share
    jobs: int = 1  # runs at a time, which share the cores

    def check(self):
        yield from knobs.check_choice(self, "script", CONFIGS)
        yield from knobs.check_choice(self, "metric", [name for name in METRICS if name.startswith("val_")])
        yield from knobs.check_choice(self, "wide", ("", *METRICS))
        if self.report and self.script != "finetune.py":
            yield "report is for script = 'finetune.py': evaluate.py scores what that has made"
        yield from knobs.check_positive(self, "seeds", "jobs")
        yield from knobs.check_not_negative(self, "widen")
        if not self.arms:
            yield "arms is empty; name a study, for example sample_config/study/cls.py"
        for arm in self.arms:
            try:
                shlex.split(arguments_of(self, arm, 1))
            except ValueError as error:
                yield f"arm {arm!r}: {error} in {arguments_of(self, arm, 1)}"
        try:
            rates = learning_rates(self)
        except ValueError:
            rates = []
        if len(rates) in (0, 2) or not (rates[0] > 0 and math.isfinite(sum(rates))):
            yield (f"learning_rates = {self.learning_rates!r}: one (not tuned), or three and more numbers, "
                   "separated by commas")


def check_arms(config):
    """Read the arguments of each arm as its script would, look for its files: better now than hours later."""
    for arm in config.arms:
        for seed in range(1, config.seeds + 1):
            try:
                run_config = knobs.load_config(CONFIGS[config.script],
                                               args=shlex.split(arguments_of(config, arm, seed)))
                data.read_meta(run_config.data_dir)
                if config.report in (run_config.train_split, run_config.val_split):
                    common.fail(f"report = {config.report!r}: the run learns or tunes on it; choose another "
                                "split")
                if config.report:
                    data.open_split(run_config.data_dir, config.report)
                for key in ("pretrained", "branch_from"):
                    path = getattr(run_config, key, "")
                    if path and not os.path.isfile(path):
                        common.fail(f"{path}: no such checkpoint; run the study that makes it first")
            except SystemExit as end:
                common.fail(f"arm {arm}: {str(end.code).removeprefix('error: ')}")


def learning_rates(config):
    """Rounded as they are written in the results."""
    return sorted({float(f"{float(rate):g}") for rate in config.learning_rates.split(",")})


def arguments_of(config, arm, seed):
    return f"{config.shared} {config.arms[arm]}".replace("{seed}", str(seed)).strip()


def knobs_of(config, arm, seed):
    """A checksum of the knobs that the arguments set, but for COMPUTING, and of the split reported on.

    By it results of an older version of a config file are known.
    """
    found = {"report": config.report} if config.report else {}
    for argument in shlex.split(arguments_of(config, arm, seed)):
        key, _, text = argument.removeprefix("--").partition("=")
        if argument.startswith("--"):
            found[key] = knobs.parse_flag(text)
        else:
            found |= knobs.read_config_file(argument)
    found = {key: value for key, value in found.items() if key not in COMPUTING}
    return f"{zlib.crc32(json.dumps(found, sort_keys=True, default=str).encode()):08x}"


# ------------------------------------------------------------------------------------------------------------
# the file of results
# ------------------------------------------------------------------------------------------------------------

def read_results(path):
    """The rows of a results file as dicts of strings; [] if there is no file."""
    if not os.path.isfile(path):
        return []
    with open(path, newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        rows = list(reader)
    if reader.fieldnames != RESULTS or any(None in (*row, *row.values()) for row in rows):
        common.fail(f"{path}: not a file of results of this version; choose another one with --results=")
    return rows


def add_results(path, rows):
    """Put rows after those that the file has by now: another study may have written to it."""
    def write(part):
        with open(part, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, RESULTS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(read_results(path) + rows)
    common.write_atomic(path, write)


def final_rows(rows, study):
    """The last evaluation of each run of a study -> dict (arm, learning rate, seed) to row."""
    rows = sorted((row for row in rows if row["study"] == study), key=lambda row: int(row["step"]))
    return {(row["arm"], float(row["learning_rate"]), int(row["seed"])): row for row in rows}


def number_in(row, column):
    return float(row[column] or "nan")


def spread(values):
    """Standard deviation over seeds, of which the mean is estimated too: n - 1. NaN for a single one."""
    return np.std(values, ddof=1) if len(values) > 1 else float("nan")


def best_rate(final, arm):
    """The learning rate with which seed 1 ended lowest in the study's metric; one that diverged is last."""
    ends = {rate: np.nan_to_num(number_in(row, row["metric"]), nan=np.inf)
            for (name, rate, seed), row in final.items() if (name, seed) == (arm, 1)}
    return min(ends, key=ends.get)


# ------------------------------------------------------------------------------------------------------------
# runs
# ------------------------------------------------------------------------------------------------------------

def missing_runs(config, final):
    """The runs (arm, learning rate, seed) that can start now: the tuning of all arms, then other seeds."""
    rates = learning_rates(config)
    tuning = [(arm, rate, 1) for arm in config.arms for rate in rates if (arm, rate, 1) not in final]
    if tuning:
        return tuning
    jobs = []
    for arm in config.arms:
        tried = sorted(rate for name, rate, seed in final if (name, seed) == (arm, 1))
        best, n_widened = best_rate(final, arm), sum(not rates[0] <= rate <= rates[-1] for rate in tried)
        if not final[arm, best, 1][config.metric]:
            common.fail(f"arm {arm} has diverged with every learning rate, "
                        f"{', '.join(f'{rate:g}' for rate in tried)}; put smaller ones into learning_rates")
        if len(rates) > 1 and best in (tried[0], tried[-1]) and n_widened < config.widen:
            neighbour = tried[1] if best == tried[0] else tried[-2]
            jobs.append((arm, float(f"{best * best / neighbour:g}"), 1))
        else:
            jobs += [(arm, best, seed) for seed in range(2, config.seeds + 1)]
    return [job for job in jobs if job not in final]


def folder_of(config, arm, rate, seed):
    return Path(config.out_dir) / arm / f"lr{rate:g}_seed{seed}"


def start_script(command, stdout, n_threads):
    return subprocess.run(command, stdout=stdout, stderr=subprocess.STDOUT, check=False,
                          env={**os.environ, "OMP_NUM_THREADS": str(n_threads)})


def is_complete(config, checkpoint):
    run_config = SimpleNamespace(**checkpoint["config"])
    if config.script == "finetune.py":
        return finetune.is_complete(checkpoint, run_config)
    return checkpoint["step"] >= run_config.max_steps


def run(config, arm, rate, seed):
    """Call the script for one run -> its rows of results; if it diverges one at step 0, without numbers."""
    folder, arguments = folder_of(config, arm, rate, seed), arguments_of(config, arm, seed)
    command = [sys.executable, config.script, *shlex.split(arguments), f"--learning_rate={rate}",
               f"--seed={seed}", f"--out_dir={folder}"]
    folder.mkdir(parents=True, exist_ok=True)
    n_threads = max(common.count_cores() // config.jobs, 1)
    with open(folder / "output.txt", "a+", encoding="utf-8") as output:
        before = output.tell()  # a run that was stopped has said something already
        status = start_script(command, output, n_threads).returncode
        if status == 0:
            checkpoint = common.load_checkpoint(folder / "ckpt.pt")
            if not is_complete(config, checkpoint):
                common.fail(f"{folder} was stopped at step {checkpoint['step']}; the same command goes on "
                            "from there")
            if config.report:
                command = [sys.executable, "evaluate.py", f"--checkpoint={folder}/best.pt",
                           f"--split={config.report}"]
                status = start_script(command, output, n_threads).returncode
        output.seek(before)
        errors = [line for line in output.read().splitlines() if line.startswith("error: ")]
        output.seek(0)
        headers = [line for line in output.read().splitlines()
                   if line.startswith("run ") and " | commit " in line]
    row = dict.fromkeys(RESULTS, "") | {
        "study": Path(config.out_dir).name, "arm": arm, "learning_rate": f"{rate:g}", "seed": str(seed),
        "metric": config.metric, "arguments": arguments, "knobs": knobs_of(config, arm, seed)}
    if status == common.DIVERGED_STATUS:
        return [row | {"step": "0"}]
    if status:
        common.fail(f"{shlex.join(command)} ended with status {status}; "
                    f"{errors[0] if errors else f'see {folder}/output.txt'}")

    row["hardware"] = (headers or [""])[-1].partition(" | ")[2]
    row["parameters"] = str(common.count_parameters(checkpoint["model"]))
    with open(folder / "log.csv", newline="", encoding="utf-8") as file:
        log = list(csv.DictReader(file))
    speeds = [float(line["events_per_s"]) for line in log if line["events_per_s"]]
    row["events_per_s"] = f"{np.median(speeds):.4g}"
    rows = [row | {key: line[key] for key in ("step", "events", *METRICS) if key in line} for line in log
            if line["val_loss"] and line["step"] != "0"]
    if not rows[-1][config.metric]:
        common.fail(f"{folder}/log.csv has no {config.metric}; choose another metric")
    split = config.report or checkpoint["config"]["val_split"]
    if (folder / f"evaluation_{split}.json").exists():
        found = read_evaluation(folder, split)
        if config.report:
            rows[-1] |= {column.replace("val_", "report_"): f"{found['rows'][0][name]:.6g}"
                         for column, name in TASKS[found["task"]].log.items()
                         if found["rows"][0][name] is not None}  # the ROC area of a single class
        if "calibration" in found:
            for level in (50, 90):
                share = np.interp(level / 100, found["calibration"]["level"], found["calibration"]["inside"])
                rows[-1][f"coverage_{level}"] = f"{share:.4f}"
    return rows


def read_evaluation(run, split):
    """The evaluation_<split>.json of a fine-tuning run, if it is that of the run's present best.pt."""
    path, best = Path(run) / f"evaluation_{split}.json", Path(run) / "best.pt"
    again = f"evaluate it: python evaluate.py --checkpoint={best} --split={split} --n_events=..."
    if not path.is_file():
        common.fail(f"{path}: no such file; it must be a run of finetune.py; {again}")
    found, step = common.read_json(path), common.load_checkpoint(best)["step"]
    if (found.get("checkpoint"), found.get("step")) != (best.name, step):
        common.fail(f"{path} is of {found.get('checkpoint')} at step {found.get('step')}, {best} is at step "
                    f"{step}; {again}")
    return found


def keep_best(config, arm, rate, seed, replace):
    """Copy a run with the best learning rate to out_dir/<arm>/seed<seed>, if need be -> whether it is there.

    replace: also where one with another learning rate is.
    """
    folder, best = folder_of(config, arm, rate, seed), Path(config.out_dir) / arm / f"seed{seed}"

    def is_there():
        return best.exists() and common.read_json(best / "config.json")["learning_rate"] == rate
    if folder.exists() and not is_there() and (replace or not best.exists()):
        part = best.with_name(f"{best.name}.part")
        for old in (part, best):
            shutil.rmtree(old, ignore_errors=True)
        shutil.copytree(folder, part)
        part.rename(best)
    return is_there()


def best_runs(config, final):
    """The runs of each arm with its best learning rate, dict arm to rows of results."""
    best = {arm: best_rate(final, arm) for arm in config.arms}
    return {arm: [row for (name, rate, seed), row in final.items()
                  if (name, rate) == (arm, best[arm]) and seed <= config.seeds] for arm in config.arms}


def over_seeds(rows, metric):
    """Mean and standard deviation as text; empty if a run has no such number."""
    n_diverged = sum(row["step"] == "0" for row in rows)
    if n_diverged:
        return f"diverged ({n_diverged} of {len(rows)})"
    numbers = [number_in(row, metric) for row in rows]
    text = "" if math.isnan(np.mean(numbers)) else f"{np.mean(numbers):.4g}"
    return f"{text} +- {spread(numbers):.2g}" if text and len(rows) > 1 else text


def wide_table(config, final):
    """Yield lines of markdown: the metric config.wide of arm a/b/c in row a/b, column c."""
    cells = {tuple(arm.rpartition("/")[::2]): over_seeds(rows, config.wide)
             for arm, rows in best_runs(config, final).items()}
    names, columns = (list(dict.fromkeys(place)) for place in zip(*cells))
    yield f"| {config.wide} | " + " | ".join(columns) + " |"
    yield "|---" * (len(columns) + 1) + "|"
    for name in names:
        yield f"| {name} | " + " | ".join(cells.get((name, column), "") for column in columns) + " |"


def table(config, final):
    """Yield lines of markdown, one per arm: mean and standard deviation over seeds, the tuning of seed 1."""
    runs = best_runs(config, final)
    known = {metric for rows in runs.values() for row in rows for metric in METRICS if row[metric]}
    shown = [metric for metric in METRICS
             if metric == config.metric or metric in known and metric != "val_loss"]
    tuning_head = f"{config.metric} of seed 1 by learning rate"
    yield "| " + " | ".join(["arm", "learning rate", "seeds", *shown, tuning_head]) + " |"
    yield "|---" * (len(shown) + 4) + "|"
    for arm, rows in runs.items():
        cells = [over_seeds(rows, metric) for metric in shown]
        tuning = sorted((rate, number_in(row, config.metric)) for (name, rate, seed), row in final.items()
                        if (name, seed) == (arm, 1))
        yield "| " + " | ".join([arm, rows[0]["learning_rate"], str(len(rows)), *cells,
                                 ", ".join(f"{rate:g}: {end:.4g}" for rate, end in tuning)]) + " |"


# ------------------------------------------------------------------------------------------------------------

def main():
    config = knobs.load_config(StudyConfig, __doc__)
    study = Path(config.out_dir).name

    def done():
        return final_rows(read_results(config.results), study)

    for (arm, _, seed), row in done().items():
        if arm in config.arms and (row["knobs"], row["metric"]) != (
                knobs_of(config, arm, seed), config.metric):
            common.fail(f"{config.results}: arm {arm} of {study} was run with other knobs, "
                        f"{row['arguments']}, or another report or metric; set them back, or choose another "
                        "out_dir, whose last part is the study's name")
    has_to_run = bool(missing_runs(config, done()))
    if has_to_run:
        check_arms(config)
        knobs.print_knobs(config)
    while jobs := missing_runs(config, done()):
        with (common.progress_bar(len(jobs), f"study {study}", "run") as bar,
              ThreadPoolExecutor(config.jobs) as pool):
            try:
                for future in as_completed([pool.submit(run, config, *job) for job in jobs]):
                    rows = future.result()
                    add_results(config.results, rows)
                    last = rows[-1]
                    bar.write(f"run {study} | {last['arm']} | lr {last['learning_rate']} seed {last['seed']} "
                              f"| {config.metric} {last[config.metric] or 'diverged'}")
                    bar.update()
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
    final = done()
    if not all([keep_best(config, arm, best_rate(final, arm), seed, replace=has_to_run) for arm in config.arms
                for seed in range(1, config.seeds + 1)]):
        print(f"note: {config.out_dir} lacks runs with the best learning rate; a study that begins from them "
              "cannot run, or begins from others")
    print(*(wide_table if config.wide else table)(config, final), sep="\n")


if __name__ == "__main__":
    common.run_stage(main)
