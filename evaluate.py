"""Stage 4: score a fine-tuned model next to a line fit; write predictions.

    python evaluate.py --checkpoint=out/demo_finetune/best.pt  # validation events
    python evaluate.py --checkpoint=out/demo_finetune/best.pt --split=test --predictions=test.csv
    python evaluate.py --checkpoint=out/demo/ckpt.pt --embeddings=cls.parquet

Prints scores in bins. Next to the checkpoint: evaluation_[<other data>_]<split>.json.
"""
import utils  # before torch

from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import torch

import data
from model import TASKS, PolarBERT, Reconstructor, angular_error, unit_vector, weights_for_detector

@dataclass
class EvaluateConfig:
    checkpoint: str = "out/demo_finetune/best.pt"  # also of train.py, for embeddings
    data_dir: str = ""  # folder that prepare.py wrote; "" = that of the checkpoint
    split: str = ""  # "" = val_split of the checkpoint
    n_events: int = 0  # use the first N events; 0 = all
    predictions: str = ""  # .csv as Kaggle wants it, .parquet with the truth
    suffix: str = ""  # of its columns: _pred for NuBench
    embeddings: str = ""  # .parquet file for the [CLS] vectors
    batch_size: int = 1024  # events at a time, over all ranks
    micro_batch_size: int = 0  # events at once; 0 = what suits the device
    device: utils.Device = "auto"  # auto: a GPU if there is one
    dtype: utils.Dtype = "auto"  # auto: what is fast here

# ---- predictions --------------------------------------------------------------------------------

def load_model(path, data_dir=""):
    """Rebuild a checkpoint's model for data_dir -> model, config, checkpoint."""
    checkpoint = utils.load_checkpoint(path)
    run = SimpleNamespace(**checkpoint["config"])
    run.data_dir = data_dir or run.data_dir
    meta, geometry = data.read_folder(run.data_dir)
    if (rule := checkpoint["data"]["rule"]) != meta["rule"]:
        utils.print0(f"warning: {path}: of other data, rule {rule}, here {meta['rule']}")
    is_other = checkpoint["data"].get("fingerprint") != meta["fingerprint"]
    checkpoint["prefix"] = "evaluation_" + f"{Path(run.data_dir).name}_" * is_other
    model = (Reconstructor if hasattr(run, "task") else PolarBERT)(run, geometry)
    model.load_state_dict(weights_for_detector(checkpoint["model"], geometry, path))
    return model, run, checkpoint

@torch.no_grad()
def predict(model, split, config, autocast, wants_cls=False):
    """Go through a split in its order -> events (n,), arrays (n, ...), n <= batch_size.

    The arrays, on all ranks: x, what the head gives, and loss, if there is a task; cls.
    """
    device = next(model.parameters()).device
    n_events, labels = len(split.events), TASKS[config.task][0] if hasattr(config, "task") else ()
    starts = range(0, n_events, config.batch_size)
    def load(start):
        mine = start + data.shard(min(config.batch_size, n_events - start))
        return [] if len(mine) == 0 else data.micro_batches(
            *data.read_events(split, mine), config.micro_batch_size, labels)
    for start, batches in zip(starts, data.prefetch(load, starts, device)):
        parts = []
        for batch in batches:
            with autocast:
                cls, _ = model.encoder(batch)
                part = {"cls": cls.float()} if wants_cls else {}
                if labels:
                    part["x"] = model.head(cls).float()
                    part["loss"] = model.loss(part["x"], batch)
            parts.append(part)
        arrays = {name: torch.cat([part[name] for part in parts]).cpu().numpy()
                  for name in (parts[0] if parts else ())}
        order = np.argsort(np.concatenate([[], *(batch["row"] for batch in batches)]))
        arrays = {name: array[order] for name, array in arrays.items()}
        if utils.WORLD_SIZE > 1:  # concatenate those of all ranks
            gathered = [None] * utils.WORLD_SIZE
            torch.distributed.all_gather_object(gathered, arrays)
            arrays = {name: np.concatenate([part[name] for part in gathered if part])
                      for name in gathered[0]}
        yield split.events[start:start + config.batch_size], arrays

def has_labels(events, task):
    """Return which events have a task's labels (n,); unknown is NaN, or class 0."""
    if task == "class":
        return events["event_class"] > 0
    return np.all([np.isfinite(events[label]) for label in TASKS[task][0]], axis=0)

# ---- scores -------------------------------------------------------------------------------------

def task_scores(x, events, task) -> dict:
    """Score what the head gives, x (n, width) -> {"error": array (n,), ...}."""
    if task == "energy":
        return {"error": x[:, 0] + 4 - np.log10(events["energy"])}  # [dex]
    if task == "class":
        is_track, p_track = events["event_class"] == 1, torch.from_numpy(x[:, 0]).sigmoid().numpy()
        return {"error": np.abs(is_track - p_track), "p_track": p_track, "is_track": is_track}
    x, line_fit = torch.from_numpy(x), torch.from_numpy(events["line_fit"].copy())
    truth = unit_vector(*(torch.from_numpy(events[name].copy()) for name in ("azimuth", "zenith")))
    kappa = x.norm(dim=-1).clamp(min=1e-3)
    direction = x / kappa[:, None]
    # the probability inside the contour that goes through the truth: uniform if kappa is right
    one_minus_cosine = (direction - truth).square().sum(-1) / 2
    quantile = torch.expm1(-kappa * one_minus_cosine) / torch.expm1(-2 * kappa)
    scores = {"error": angular_error(direction, truth), "quantile": quantile,  # [rad]
              "line_fit_error": angular_error(line_fit, truth), "truth": truth}
    return {name: values.numpy() for name, values in scores.items()}

def statistics(scores, task):
    """Summarise scores -> two dicts: of the model, and without learning."""
    error = scores["error"]
    if task == "energy":
        return {"bias": error.mean(), "resolution": error.std()}, {}
    if task == "class":
        is_track = scores["is_track"] > 0
        area = roc_area(scores["p_track"], is_track)
        return ({"accuracy": (error < 0.5).mean(), "roc_area": area},
                {"guess_accuracy": max(is_track.mean(), 1 - is_track.mean())})
    truth, line_fit_error = scores["truth"], scores["line_fit_error"]
    guess = truth.mean(axis=0) / np.linalg.norm(truth.mean(axis=0))  # one for all
    return ({"mean": error.mean(), "median": np.median(error), "q68": np.quantile(error, 0.68)},
            {"line_fit_mean": line_fit_error.mean(), "line_fit_median": np.median(line_fit_error),
             "guess_mean": np.arccos(np.clip(truth @ guess, -1, 1)).mean()})

def roc_area(number, is_positive):
    """Return the chance that a positive event has the larger number."""
    n, n_positive = len(number), int(is_positive.sum())
    if n_positive in (0, n):
        return np.nan
    _, place, count = np.unique(number, return_inverse=True, return_counts=True)
    rank = (np.cumsum(count) - (count - 1) / 2)[place]  # ties share the mean
    return (rank[is_positive].mean() - (n_positive + 1) / 2) / (n - n_positive)

def bins_of(events):
    """Return (name, mask) for each row of the table."""
    kind, n, zenith = events["event_class"], events["n_pulses"], np.degrees(events["zenith"])
    bins = [("track", kind, 1, 2), ("cascade", kind, 2, 3)]
    for k in range(-9, 20):  # all there are
        bins.append((f"1e{k} to 1e{k + 1} GeV", events["energy"], 10.0**k, 10.0 ** (k + 1)))
    for low, high in ((1, 32), (32, 64), (64, 128), (128, 256), (256, 1024), (1024, np.inf)):
        bins.append((f"{low} to {high - 1} pulses", n, low, high))
    for low, high in ((0, 60), (60, 120), (120, 181)):  # 180 degrees are in the last
        bins.append((f"zenith {low} to {low + 60} deg", zenith, low, high))
    masks = [(name, (x >= low) & (x < high)) for name, x, low, high in bins]
    return [("all", np.ones(len(events), bool)), *masks]

def evaluation_table(scores, events, task, n_bootstrap=100, min_events=10):
    """Return a dict per bin: n, statistics with bootstrap errors, the baselines."""
    rng, rows = np.random.default_rng(0), []
    for name, mask in bins_of(events):
        n, index = int(mask.sum()), np.flatnonzero(mask)
        if name != "all" and n < min_events:
            continue
        results, baselines = statistics({key: x[index] for key, x in scores.items()}, task)
        samples = []
        for _ in range(n_bootstrap):
            sample = index[rng.integers(n, size=n)]
            resampled, _ = statistics({key: x[sample] for key, x in scores.items()}, task)
            samples.append(list(resampled.values()))
        row = {"bin": name, "n": n}
        for key, error in zip(results, np.std(samples, axis=0)):
            row |= {key: float(results[key]), f"{key}_error": float(error)}
        rows.append(row | {key: float(value) for key, value in baselines.items()})
    return rows

def print_table(rows):
    names = [key for key in rows[0] if key not in ("bin", "n") and not key.endswith("_error")]
    utils.print0(f"{'':<24}{'events':>9}" + "".join(f"{name:>19}" for name in names))
    for row in rows:
        line = f"{row['bin']:<24}{row['n']:>9,}"
        for name in names:
            error = f" +- {row[f'{name}_error']:.2g}" if f"{name}_error" in row else ""
            line += f"{row[name]:.4g}{error}".rjust(19)
        utils.print0(line)

def prediction_table(events, x, config, run):
    """Return a table, as Kaggle wants it (.csv), or with the truth (.parquet)."""
    x = x.astype(np.float64)
    columns, extra = {"event_id": events["event_id"].copy()}, {}
    if run.task == "direction":
        kappa = np.linalg.norm(x, axis=1)
        direction = x / np.maximum(kappa, 1e-12)[:, None]
        azimuth = np.arctan2(x[:, 1], x[:, 0]) % (2 * np.pi) % (2 * np.pi)
        columns |= {"azimuth": azimuth, "zenith": np.arccos(np.clip(direction[:, 2], -1, 1))}
        extra = {f"dir_{axis}": part for axis, part in zip("xyz", direction.T)}
        extra |= {"kappa": kappa} if "vmf" in run.direction_loss else {}
    elif run.task == "energy":
        columns["energy"] = 10.0 ** (x[:, 0] + 4)  # [GeV]
    else:
        columns["p_track"] = 1 / (1 + np.exp(-x[:, 0]))
    if not config.predictions.endswith(".csv"):
        columns |= extra
        columns = {x + config.suffix * (x != "event_id"): columns[x] for x in columns}
        columns |= {"n_pulses": events["n_pulses"].copy()}
        columns |= {f"true_{name}": events[name].copy()
                    for name in ("azimuth", "zenith", "energy", "event_class")}
    return pa.table(columns)

def write_table(path, table):
    write = pyarrow.csv.write_csv if path.endswith(".csv") else pq.write_table
    utils.write_atomic(path, lambda part: write(table, part))
    utils.print0(f"written {path}")

def evaluate_checkpoint(config, device, autocast):
    """Score a checkpoint, write the files that are asked for."""
    model, run, checkpoint = load_model(config.checkpoint, config.data_dir)
    task, run.val_split = getattr(run, "task", None), config.split or run.val_split
    split = data.open_split(run.data_dir, run.val_split, config.n_events)
    if task is None and (config.predictions or not config.embeddings):
        utils.fail(f"{config.checkpoint}: a pretrained model can only write --embeddings")
    run.batch_size = config.batch_size
    run.micro_batch_size = config.micro_batch_size or data.fitting_micro_batch_size(
        run, device, checkpoint["data"])
    parts = [x for _, x in predict(model.to(device), split, run, autocast, config.embeddings)]
    arrays = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    if utils.RANK > 0:
        return
    if config.embeddings:
        cls = pa.FixedSizeListArray.from_arrays(arrays["cls"].ravel(), arrays["cls"].shape[1])
        event_id = split.events["event_id"].copy()
        write_table(config.embeddings, pa.table({"event_id": event_id, "cls": cls}))
    if config.predictions:
        write_table(config.predictions, prediction_table(split.events, arrays["x"], config, run))
    labelled = has_labels(split.events, task) if task else np.zeros(1, bool)
    if task and not labelled.all():
        utils.print0(f"note: {(~labelled).sum():,} of {len(labelled):,} events have no {task}")
    if labelled.any():
        report(arrays["x"][labelled], split.events[labelled], config.checkpoint, run, checkpoint)

def report(x, events, path, run, checkpoint):
    """Print the scores of x (n, width), write evaluation_*.json."""
    scores = task_scores(x, events, run.task)
    rows = evaluation_table(scores, events, run.task)
    print_table(rows)
    content = {"checkpoint": path, "step": checkpoint["step"], "split": run.val_split,
               "data_dir": run.data_dir, "n_train": checkpoint["data"]["n_train"], "rows": rows}
    if run.task == "direction" and "vmf" in run.direction_loss:
        content["calibration"] = {level: float((scores["quantile"] < level).mean())
                                  for level in (0.1, 0.25, 0.5, 0.75, 0.9)}
        utils.print0(f"calibration (level: share inside): {content['calibration']}")
    text = ", ".join(f"{name} {x:.4f}" for name, x in rows[0].items() if isinstance(x, float))
    if run.task == "direction":
        x, y, z = (f"{rows[0][name]:.3f} rad ({np.degrees(rows[0][name]):.1f} deg)"
                   for name in ("mean", "line_fit_mean", "guess_mean"))
        text = f"mean error {x}; a line fit has {y}, one direction for all {z}"
    utils.print0(f"{path}, {content['n_train']:,} labels: {text}")
    utils.write_json(Path(path).parent / f"{checkpoint['prefix']}{run.val_split}.json", content)

def main():
    config = utils.load_config(EvaluateConfig, __doc__)
    device, _, autocast = utils.init_distributed(config)
    evaluate_checkpoint(config, device, autocast)

if __name__ == "__main__":
    utils.run_main(main)
