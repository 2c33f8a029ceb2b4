"""Stage 4: what is a fine-tuned model worth? Score it, compare it with a line fit, write its predictions.

    python evaluate.py --checkpoint=out/demo_finetune/best.pt                   validation events of its run
    python evaluate.py --checkpoint=out/demo_finetune/best.pt --split=test --predictions=out/test.csv
    python evaluate.py --checkpoint=out/demo/ckpt.pt --embeddings=out/cls.parquet      what [CLS] knows

Prints the errors of all events and in bins, with bootstrap errors, beside those of a line fit and of a guess,
one direction for all events, and keeps them as evaluation_<split>.json beside the checkpoint. Events without
labels can only be predicted. Seconds for 4,000 events.
"""
import common  # first: it sets how torch's threads wait

import os
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F

import data
import knobs
from model import ModelConfig, Pretrainer, Reconstructor
from tasks import TASKS


@dataclass
class EvaluateConfig:
    checkpoint: str = "out/demo_finetune/best.pt"  # of finetune.py; for embeddings also of train.py
    data_dir: str = ""  # folder made by prepare.py; "" = that of the checkpoint's run
    split: str = ""  # split to evaluate on, or to predict; "" = val_split of the run
    n_events: int = 0  # the first N events, or as many as there are; 0 = all
    predictions: str = ""  # .csv (Kaggle's form) or .parquet (with all that is known) to write; "" = none
    embeddings: str = ""  # .parquet to write the [CLS] vector of each event to; "" = none
    batch_size: int = 1024  # events at a time, over all ranks
    micro_batch_size: int = 0  # events computed at once, which changes no result; 0 = what suits the device
    device: str = "auto"  # or "cuda", "mps", "cpu"
    dtype: str = "auto"  # "bfloat16", "float16", "float32"; auto = bfloat16 where the hardware has it

    def check(self):
        yield from knobs.check_positive(self, "batch_size")
        yield from knobs.check_not_negative(self, "n_events", "micro_batch_size")
        yield from knobs.check_device(self)
        for key, endings in (("predictions", (".csv", ".parquet")), ("embeddings", (".parquet",))):
            path = getattr(self, key)
            if path and Path(path).suffix not in endings:
                yield f"{key} = {path!r}: the name must end in {' or '.join(endings)}"
            elif path:
                yield from knobs.check_writable(path)


# ------------------------------------------------------------------------------------------------------------
# a model and its events
# ------------------------------------------------------------------------------------------------------------

def load_model(path, data_dir=""):
    """A model as its checkpoint has it -> model, config of its run, checkpoint. data_dir "": its run's."""
    saved = common.load_checkpoint(path)
    run = SimpleNamespace(**(asdict(ModelConfig()) | saved["config"]))  # a knob younger than it was off
    geometry = data.read_geometry(data_dir or run.data_dir)
    model = (Reconstructor if hasattr(run, "task") else Pretrainer)(run, geometry)
    model.load_state_dict(common.weights_for(saved, geometry, path, data_dir or run.data_dir))
    return model.eval(), run, saved


def has_label(events, label):
    """Which events have this label, (n,): an unknown class is 0, an unknown angle or energy NaN."""
    return events[label] > 0 if label == "event_class" else ~np.isnan(events[label])


def find_unlabelled(split, n_events, config):
    """Places of those among the first n_events that lack a label of the task."""
    return np.flatnonzero(~np.all([has_label(split.events[:n_events], label)
                                   for label in TASKS[config.task].labels], axis=0))


def check_labels(split, n_events, config):
    unlabelled = find_unlabelled(split, n_events, config)
    if len(unlabelled):
        common.fail(f"{split.path}: {len(unlabelled):,} of {n_events:,} events have no {config.task}, the "
                    f"first is event {split.events['event_id'][unlabelled[0]]}; choose a labelled split "
                    "(evaluate.py can predict without)")


@torch.no_grad()
def predict(model, split, n_events, config, process, wants_cls=False):
    """Go through the first n_events in their order, batch_size at a time. Yields index (n,), arrays (n, ...).

    config: task and losses of the model, batch_size and micro_batch_size. The arrays hold what all ranks have
    found: the outputs of a Reconstructor, its loss (without labels it means nothing) and what line_fit gives;
    cls, the vector of [CLS], if wants_cls.
    """
    edges = np.linspace(0, n_events, -(-n_events // config.batch_size) + 1).astype(np.int64).tolist()
    shares = [a + common.share_of_rank(b - a, process) for a, b in zip(edges, edges[1:])]
    geometry = model.encoder.embedding.geometry
    task = TASKS[config.task] if hasattr(config, "task") else None
    was_training = model.training
    model.eval()

    def load(i):
        if len(shares[i]) == 0:
            return []  # more ranks than events
        return data.micro_batches(*data.read_events(split, shares[i]), config.micro_batch_size,
                                  task.labels if task else ())

    with common.progress_bar(n_events, f"predict {split.path}", "event") as bar:
        for a, b, share, batches in zip(edges, edges[1:], shares,
                                        data.prefetch(load, range(len(shares)), process.device)):
            arrays = {}
            for batch in batches:
                with process.autocast:
                    cls, _ = model.encoder(batch)
                    found = {"cls": cls} if wants_cls else {}
                    if task:
                        outputs = model.answer(cls)
                        losses = task.loss(outputs, batch, config)
                        found |= outputs | {"loss": losses} | line_fit(batch, geometry)
                for name, value in found.items():
                    empty = np.empty((len(share), *value.shape[1:]), np.float32)
                    arrays.setdefault(name, empty)[batch["row"]] = value.float().cpu().numpy()
            yield np.arange(a, b), common.gather_arrays(arrays, process)
            bar.update(b - a)
    model.train(was_training)


# ------------------------------------------------------------------------------------------------------------
# scores
# ------------------------------------------------------------------------------------------------------------

def line_fit(batch, geometry):
    """The baseline: fit position = r + v time to the good pulses.

    -> line_fit, unit vectors (B, 3) along -v; line_fit_speed (B,), |v| [m/ns].

    Pulses count by their charge; where no fit is possible the vector is 0. IceCube's first guess
    (astro-ph/0407044, section 3.1.3), 1.18 rad on average on Kaggle's data.
    """
    lengths = batch["starts"].diff()
    event = torch.repeat_interleave(lengths, output_size=len(batch["time"]))  # of each token, (T,)

    def sums(values):
        """Over each event's tokens, (T, ...) -> (B, ...)."""
        return values.new_zeros(len(lengths), *values.shape[1:]).index_add(0, event, values)

    weight = batch["charge"] * ~batch["aux"]  # (T,), 0 at [CLS]
    mean = sums(weight * batch["time"]) / sums(weight).clamp(min=1e-6)  # (B,)
    time = batch["time"] - mean[event]
    velocity = sums((weight * time)[:, None] * geometry[batch["dom"]])  # times the times' spread
    # a spread below 10 ns is that of single DOMs, or of rounding: it tells no speed
    spread = torch.maximum(sums(weight * time.square()), 100 * sums(weight)).clamp(min=1e-6)
    return {"line_fit": F.normalize(-velocity, dim=-1), "line_fit_speed": velocity.norm(dim=-1) / spread}


def score(arrays, events, config):
    """Scores of some events -> dict of (n,): loss, error and what else the task is judged by."""
    return {"loss": arrays["loss"], **TASKS[config.task].score(arrays, events, config)}


def score_events(model, split, n_events, config, process):
    """Scores of the first n_events of a labelled split -> dict of arrays (n_events,), on every rank."""
    parts = [score(arrays, split.events[index], config)
             for index, arrays in predict(model, split, n_events, config, process)]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def statistic_of(statistic, scores, index=slice(None)):
    """One of Task.statistics or Task.baselines, of all events or some."""
    function, *names = statistic
    return float(function(*(scores[name][index] for name in names)))


def summary(scores, config):
    """The val_* columns of log.csv, of all scores."""
    task, exact = TASKS[config.task], {name: values.astype(np.float64) for name, values in scores.items()}
    return {"val_loss": float(exact["loss"].mean()),
            **{column: statistic_of(task.statistics[name], exact) for column, name in task.log.items()}}


# ------------------------------------------------------------------------------------------------------------
# statistics, in bins
# ------------------------------------------------------------------------------------------------------------

N_BOOTSTRAP = 100  # resamplings of the events: the spread of a statistic over them is its error, good to 7 %
MIN_EVENTS = 10  # a smaller bin is not shown, and of fewer events no error is estimated
LEVELS = np.linspace(0.05, 0.95, 19)  # of probability, at which the contours are checked


def bins_of(events):
    """Yield (kind, label, mask) for each group of events that gets a row; what is unknown gives no group."""
    yield "all", "all", np.ones(len(events), bool)
    for number, name in ((1, "track"), (2, "cascade")):
        yield "class", name, events["event_class"] == number
    for low in range(0, 8):
        is_inside = (events["energy"] >= 10.0**low) & (events["energy"] < 10.0**(low + 1))
        yield "energy", f"1e{low} to 1e{low + 1} GeV", is_inside
    for low, high in ((1, 32), (32, 64), (64, 128), (128, 256), (256, 1024), (1024, 2**32)):
        label = f"{low} to {high - 1}" if high < 2**32 else f"{low} or more"
        yield "pulses", label, (events["n_pulses"] >= low) & (events["n_pulses"] < high)
    zenith = np.degrees(events["zenith"])
    for low, high in ((0, 60), (60, 120), (120, 181)):  # 180 degrees are in the last
        yield "zenith", f"{low} to {low + 60} deg", (zenith >= low) & (zenith < high)


def evaluation_table(scores, events, config):
    """Rows (dicts) for all events and in bins -> rows, and those left out as they have fewer than MIN_EVENTS.

    A row has n, each statistic with its bootstrap error (None for too few events), and the baselines. A
    statistic that makes no sense in a bin is NaN.
    """
    task, rng, rows, left_out = TASKS[config.task], np.random.default_rng(0), [], []
    for kind, label, mask in bins_of(events):
        n = int(mask.sum())
        row = {"kind": kind, "bin": label, "n": n}
        if kind != "all" and n < MIN_EVENTS:
            left_out.append(row)
            continue
        index, resampled = np.flatnonzero(mask), []
        for _ in range(N_BOOTSTRAP):
            sample = index[rng.integers(n, size=n)]
            resampled.append([statistic_of(one, scores, sample) for one in task.statistics.values()])
        for (name, statistic), found in zip(task.statistics.items(), np.transpose(resampled)):
            row[name] = statistic_of(statistic, scores, index)
            has_error = n >= MIN_EVENTS and not np.isnan(row[name])
            row[f"{name}_error"] = float(np.nanstd(found)) if has_error else None
        row |= {name: statistic_of(statistic, scores, index) for name, statistic in task.baselines.items()}
        rows.append(row)
    return rows, left_out


def print_evaluation(rows, left_out, config):
    task = TASKS[config.task]
    unit = f" [{task.unit}]" if task.unit else ""
    names = [f"{name}{unit}" for name in task.statistics] + list(task.baselines)
    print(f"{'':<8}{'':<18}{'events':>9}" + "".join(f"{name.replace('_', ' '):>20}" for name in names))
    for row in rows:
        cells = [with_error(row, name, ".4g", ".2g") for name in task.statistics]
        cells += [f"{row[name]:.4g}" for name in task.baselines]
        cells = ["-" if cell == "nan" else cell for cell in cells]  # ROC area of a bin of one class
        print(f"{row['kind']:<8}{row['bin']:<18}{row['n']:>9,}" + "".join(f"{cell:>20}" for cell in cells))
    small = [f"{row['kind']} {row['bin']} ({row['n']})" for row in left_out if row["n"]]
    if small:
        print(f"not shown, fewer than {MIN_EVENTS} events: {', '.join(small)}")


def with_error(row, name, form, error_form):
    """A statistic as text, with its error where that is known."""
    error = row[f"{name}_error"]
    return f"{row[name]:{form}}" if error is None else f"{row[name]:{form}} +- {error:{error_form}}"


def report(scores, events, config, run, saved):
    """Print the table of a checkpoint's errors -> what result.txt and evaluation_<split>.json hold."""
    path, task = config.checkpoint, TASKS[run.task]
    rows, left_out = evaluation_table(scores, events, run)
    start = f"pretrained {saved['config']['pretrained']}" if saved["config"]["pretrained"] else "from scratch"
    where = config.split if config.data_dir == run.data_dir else f"{config.data_dir}/{config.split}"
    result = f"{path} | {start} | {saved['n_train']:,} labels | {len(events):,} events of {where} | "
    errors = {name: value for name, value in rows[0].items() if name.endswith("_error")}
    result += task.result.format_map(rows[0] | {name: "" if value is None else f" +- {value:.4f}"
                                                for name, value in errors.items()})
    content = {"checkpoint": Path(path).name, "step": saved["step"],
               "pretrained": saved["config"]["pretrained"],
               "freeze_backbone": saved["config"]["freeze_backbone"], "n_train": saved["n_train"],
               "task": run.task, "direction_loss": run.direction_loss, "data_dir": config.data_dir,
               "data": data.fingerprint(config.data_dir), "split": config.split, "n_events": len(events),
               "errors_by": f"{N_BOOTSTRAP} bootstrap samples of the events", "left_out": left_out,
               "rows": [{name: None if value != value else value for name, value in row.items()}
                        for row in rows]}
    print_evaluation(rows, left_out, run)
    edges = np.linspace(*task.span, 61)
    content["histogram"] = {"edges": edges.tolist(), **{name: np.histogram(scores[name], edges)[0].tolist()
                                                        for name in ("error", "fit_error") if name in scores}}
    if "quantile" in scores:
        inside = [float((scores["quantile"] < level).mean()) for level in LEVELS]
        content["calibration"] = {"level": LEVELS.tolist(), "inside": inside}
        print(f"calibration: {np.interp(0.5, LEVELS, inside):.1%} of the events lie inside their 50 % "
              f"contour, {np.interp(0.9, LEVELS, inside):.1%} inside that of 90 %")
    print(result)
    return result, content


def evaluation_path(saved, config, n_events, n_split):
    """Where the evaluation of a checkpoint is kept, beside it.

    The plain name is for best.pt on the events of its run: the first val_events of its val_split, or all of
    another split of its data. Other names say what differs.
    """
    run, path = saved["config"], Path(config.checkpoint)
    n_run = min(run["val_events"] or n_split, n_split) if config.split == run["val_split"] else n_split
    name = f"evaluation_{config.split}"
    if path.stem != "best":
        name += f"_{path.stem}"
    fingerprint = data.fingerprint(config.data_dir)
    if saved.get("data", fingerprint) != fingerprint:
        name += f"_{Path(config.data_dir).absolute().name}"
    if n_events != n_run:
        name += f"_{n_events}"
    return path.parent / f"{name}.json"


# ------------------------------------------------------------------------------------------------------------
# what is written
# ------------------------------------------------------------------------------------------------------------

def prediction_table(events, arrays, config, run, known):
    """What is written of some events: what the task tells, and more in a .parquet.

    known: which of azimuth, zenith, energy, event_class the split has; a .parquet has them too, with the
    names true_azimuth, ... A .csv has the columns of a Kaggle submission only.
    """
    task = TASKS[run.task]
    columns = {"event_id": events["event_id"], **task.columns(arrays, run)}
    if config.predictions.endswith(".csv"):
        return pa.table({name: columns[name] for name in ("event_id", *task.csv)})
    columns["n_pulses"] = events["n_pulses"]
    return pa.table(columns | {f"true_{name}": np.ascontiguousarray(events[name]) for name in known})


@contextmanager
def table_file(path):
    """-> write(table), which adds rows to a .csv or .parquet file; it gets its name when it is whole."""
    part, writers = Path(f"{path}.part"), []

    def write(table):
        if not writers:
            kind = pyarrow.csv.CSVWriter if path.endswith(".csv") else pq.ParquetWriter
            writers.append(kind(part, table.schema))
        writers[0].write_table(table)

    try:
        yield write
        writers[0].close()
        os.replace(part, path)
    except OSError as error:
        part.unlink(missing_ok=True)
        common.fail(f"{path}: cannot be written ({error}); make room or choose another file")
    print(f"written {path}")


# ------------------------------------------------------------------------------------------------------------

def evaluate_checkpoint(config, process):
    """Score a checkpoint, print and keep the result, write what is asked for -> its one line, or None."""
    model, run, saved = load_model(config.checkpoint, config.data_dir)
    config.data_dir, config.split = config.data_dir or run.data_dir, config.split or run.val_split
    split, n_events = data.open_first_events(config.data_dir, config.split, config.n_events, at_most=True)
    n_unlabelled = len(find_unlabelled(split, n_events, run)) if hasattr(run, "task") else n_events
    is_labelled = n_unlabelled == 0
    if not hasattr(run, "task") and (config.predictions or not config.embeddings):
        common.fail(f"{config.checkpoint} is a pretrained checkpoint: it has --embeddings=FILE.parquet, but "
                    "no task to evaluate")
    if not (is_labelled or config.predictions or config.embeddings):
        common.fail(f"{split.path}: {n_unlabelled:,} of {n_events:,} events have no {run.task} to evaluate "
                    "with; name a file to write: --predictions=")
    run.batch_size, max_pulses = config.batch_size, data.read_meta(config.data_dir)["max_pulses"]
    run.micro_batch_size = config.micro_batch_size or common.suited_micro_batch_size(process, max_pulses, run)
    known = [name for name in ("azimuth", "zenith", "energy", "event_class")
             if has_label(split.events[:n_events], name).any()]
    scores = []
    with ExitStack() as files:
        write, write_cls = (files.enter_context(table_file(path)) if path and process.is_main else None
                            for path in (config.predictions, config.embeddings))
        model.to(process.device)
        for index, arrays in predict(model, split, n_events, run, process, wants_cls=bool(config.embeddings)):
            events = split.events[index]
            if is_labelled:
                scores.append(score(arrays, events, run))
            if write:
                write(prediction_table(events, arrays, config, run, known))
            if write_cls:
                cls = pa.FixedSizeListArray.from_arrays(arrays["cls"].ravel(), arrays["cls"].shape[1])
                write_cls(pa.table({"event_id": events["event_id"], "cls": cls}))
    if not (is_labelled and process.is_main):
        return None
    scores = {name: np.concatenate([part[name] for part in scores]) for name in scores[0]}
    result, content = report(scores, split.events[:n_events], config, run, saved)
    path = evaluation_path(saved, config, n_events, len(split))
    if os.access(path.parent, os.W_OK):
        common.write_json(path, content)
    else:
        print(f"note: {path.parent} cannot be written to, so that {path.name} is not kept")
    return result


def main():
    config = knobs.load_config(EvaluateConfig, __doc__)
    process = common.start_process(config)
    evaluate_checkpoint(config, process)
    common.stop_process(process)


if __name__ == "__main__":
    common.run_stage(main)
