"""Stage 3: from few labels to the neutrino's direction or energy. Train a small head on [CLS], with or without the encoder.

    python finetune.py sample_config/demo_finetune.py                             from out/demo/ckpt.pt
    python finetune.py sample_config/demo_finetune.py sample_config/scratch.py    the same labels, no pretraining
    python finetune.py sample_config/demo_finetune.py --eval_only=True --val_split=test --val_events=0 \\
        --predictions=out/test.csv

Prints one line every log_interval steps and writes log.csv, ckpt.pt (last), best.pt (lowest val_loss after step 0),
config.json, result.txt and evaluation_<val_split>.json (the errors of best.pt, in bins, beside those of a line fit) into
out_dir. Exit status as train.py's. Guessing at random gives a mean angular error of pi/2 = 1.571 rad.
"""
import common  # first: it sets how torch's threads wait

import dataclasses
import os
import time
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

import data
import knobs
from model import (DIRECTION_LOSSES, N_DOMS, POSITION_SCALE, TASKS, ModelConfig, Reconstructor, angular_error, one_minus_cosine,
                   parameter_groups, unit_vector)


@dataclass
class FinetuneConfig(ModelConfig):
    data_dir: str = "data/icecube"  # folder made by prepare.py
    train_split: str = "finetune"  # split with labels to learn from
    val_split: str = "val"  # split to evaluate on, or to predict
    train_events: int = 0  # use the first N events of train_split, so that sets are nested; 0 = all
    val_events: int = 0  # evaluate on the first N events of val_split, or as many as there are; 0 = all
    out_dir: str = ""  # where the run is kept; "" = out/<stems of the config files joined by +>
    pretrained: str = "out/base/ckpt.pt"  # checkpoint whose encoder to begin with, ours or a published one; "" = from scratch
    task: str = "direction"  # what to reconstruct; or "energy", log10 of the neutrino's energy in GeV
    direction_loss: str = "angular"  # mean angle; or "cosine", "vmf" (with an uncertainty for each event), or a sum: "angular+vmf"
    freeze_backbone: bool = False  # train the head alone
    head_hidden_size: int = 1024  # of the head Linear(D, 1024), ReLU, Linear(1024, 3)
    head_lr_factor: float = 1.0  # learning rate of the head over that of the encoder
    time_offset_std: float = 0.0  # [ns] shift each event in time at random while training, so that only differences count
    batch_size: int = 1024  # events a step, over all ranks
    micro_batches: int = 4  # pieces a rank's share is cut into, sorted by length; more pieces need less memory
    max_steps: int = 19_531  # updates; 19,531 x 1024 events = 20 epochs of 1 M labels
    patience: int = 0  # end after so many evaluations without a lower val_loss; 0 = never
    learning_rate: float = 1.5e-5  # at the top of the schedule; the encoder is good already
    warmup_steps: int = 1000  # linear rise from 0; 0 = 1 / (1 - beta2)
    cooldown_steps: int = 1000  # trapezoidal only: linear fall to 0 at the end
    schedule: str = "cosine"  # or "trapezoidal", "constant"
    beta1: float = 0.92  # Adam's memory of the gradient
    beta2: float = 0.9998  # Adam's memory of its square
    adam_eps: float = 3e-7  # Adam's floor under the root of the squared gradient
    weight_decay: float = 0.0  # of the matrices only
    grad_clip: float = 1.0  # largest norm of the gradient
    eval_interval: int = 1000  # steps between evaluations
    log_interval: int = 50  # steps between log lines
    save_interval: int = 1000  # steps between checkpoints
    max_bad_steps: int = 20  # a step whose gradient is not finite is skipped; more than so many in a row end the run
    eval_only: bool = False  # no training: evaluate `checkpoint` on val_split and write predictions
    checkpoint: str = ""  # what eval_only evaluates; "" = out_dir/best.pt
    predictions: str = ""  # .csv (Kaggle's form) or .parquet (with all that is known) to write for val_split; "" = none
    export: str = ""  # eval_only: .pt2 file to write, the model for use without this repository; "" = none
    resume: bool = True  # go on from out_dir/ckpt.pt if there is one; False refuses a folder that holds a run
    seed: int = 0  # of the weights and the order of events
    device: str = "auto"  # or "cuda", "mps", "cpu"
    dtype: str = "auto"  # autocast to "bfloat16", "float16" or not ("float32"); auto = bfloat16 where it is fast
    compile: bool = False  # torch.compile, 1 minute at the start; gains nothing on a CPU
    wandb_project: str = ""  # also log to this project of Weights & Biases; "" = off

    def check(self):
        yield from super().check()
        yield from knobs.check_training(self)
        yield from knobs.check_positive(self, "head_hidden_size", "head_lr_factor")
        yield from knobs.check_not_negative(self, "time_offset_std", "patience")
        yield from knobs.check_choice(self, "task", TASKS)
        if not set(self.direction_loss.split("+")) <= DIRECTION_LOSSES.keys():
            yield f"direction_loss = {self.direction_loss!r}: choose among {', '.join(DIRECTION_LOSSES)}, or join some by +"
        if self.predictions and Path(self.predictions).suffix not in (".csv", ".parquet"):
            yield f"predictions = {self.predictions!r}: the name must end in .csv or .parquet"
        if self.export and not self.export.endswith(".pt2"):
            yield f"export = {self.export!r}: the name must end in .pt2"
        if self.export and not self.eval_only:
            yield f"export = {self.export!r} is written by --eval_only=True"
        if self.task == "energy" and getattr(self, "sources", {}).get("direction_loss") == "command line":
            yield "direction_loss has no meaning for task = 'energy'; leave it out"
        for path in filter(None, (self.predictions, self.export)):
            folder = Path(path).parent
            if Path(path).is_dir():
                yield f"{path}: is a folder, a file is needed"
            if folder != Path(self.out_dir) and not (folder.is_dir() and os.access(folder, os.W_OK)):
                yield f"{path}: {folder} is no folder to write in; make it (mkdir -p {folder}) or choose another"
        if self.checkpoint and not self.eval_only:
            yield f"checkpoint = {self.checkpoint!r} is what --eval_only=True evaluates; to begin from it, use --pretrained="
        if self.freeze_backbone and not self.pretrained:
            yield "freeze_backbone = True needs a pretrained checkpoint: a frozen random encoder learns nothing"


LABELS = {"direction": ("azimuth", "zenith"), "energy": ("energy",)}  # of EVENT, by task
# angles in rad; bias and resolution are mean and spread of log10(energy), predicted over true [dex]
LOG_COLUMNS = ["step", "events", "lr", "loss", "grad_norm", "events_per_s", "val_loss", "val_angle_mean", "val_angle_median",
               "data_ms", "bad_steps",  # time a step waits for its events; steps so far that were skipped
               "val_bias", "val_resolution"]
# Knobs that may differ when a run goes on: the steps already done would have been the same but for rounding, and for the
# learning rate's end, which max_steps and cooldown_steps move
MAY_CHANGE = {"data_dir", "out_dir", "micro_batches", "max_steps", "cooldown_steps", "eval_interval", "log_interval",
              "save_interval", "max_bad_steps", "resume", "eval_only", "checkpoint", "predictions", "device", "dtype", "compile",
              "wandb_project", "patience", "export"}


# ----------------------------------------------------------------------------------------------------------------------
# checkpoints
# ----------------------------------------------------------------------------------------------------------------------

def take_architecture(config, saved, path, keys):
    """The architecture comes from the checkpoint; a knob that was set to something else is a contradiction."""
    known = {**dataclasses.asdict(ModelConfig()), **saved["config"]}  # a knob that is younger than the checkpoint was off
    for key in keys:
        if key not in known:
            common.fail(f"{path} is no fine-tuned checkpoint (it knows no {key}); pretrained ones go to --pretrained=")
        if key in config.sources and getattr(config, key) != known[key]:
            common.fail(f"{key} = {getattr(config, key)!r}, but {path} has {known[key]!r}; leave {key} out, the checkpoint tells it")
        setattr(config, key, known[key])


def load_pretrained(path, config, geometry, data_dir):
    """A checkpoint of train.py or finetune.py, or one of the published PolarBERT code (.pth, or Lightning's .ckpt)."""
    saved = common.read_checkpoint(path)
    state = saved.get("state_dict", saved) if isinstance(saved, dict) else {}
    if not any(name.endswith("transformer_blocks.0.attention.wq.weight") for name in state):
        saved = common.load_checkpoint(path)
    else:
        try:
            shape, state = from_published(state)
        except KeyError as error:
            common.fail(f"{path}: published PolarBERT weights, but not of the plain flash variant: {error.args[0]}; not supported")
        # without positions it does not tell the detector: it is IceCube; its file has scaled positions, rounded to float32
        known = state.setdefault("encoder.embedding.geometry", torch.from_numpy(geometry))
        if (known - torch.from_numpy(geometry)).abs().max() < 0.01:
            state["encoder.embedding.geometry"] = torch.from_numpy(geometry)
        # nor do shapes tell the number of heads and the activation: those are the config's
        saved = {"model": state, "config": {**dataclasses.asdict(ModelConfig()), **shape, "num_heads": config.num_heads,
                                            "mlp": config.mlp}}
    data.check_geometry(saved, geometry, path, data_dir)
    return saved


def from_published(state):
    """A state dict of timinar/PolarBERT (flash variant) -> our ModelConfig knobs as read off the shapes, our state dict.

    Its ids: 0 is padding, sensor_id + 1 the DOM, and 5161, or later a vector of its own, the mask. Positions are scaled as ours
    are. Its logit for padding is dropped. KeyError if a name is missing or left over. Source: its src/polarbert/embedding.py,
    flash_model.py, base_model.py.
    """
    state = {name.removeprefix("model."): value.float() for name, value in state.items()}
    n_layers = 1 + max(int(name.split(".")[1]) for name in state if name.startswith("transformer_blocks."))
    cls = state.pop("embedding.cls_embedding").flatten()
    D, E = len(cls), len(cls) - len(state["embedding.features_embedding.weight"])
    shape = {"embedding_dim": D, "dom_embed_dim": E, "num_layers": n_layers,
             "hidden_size": len(state["transformer_blocks.0.feed_forward.0.weight"]),
             "use_dom_positions": "embedding.position_embedding.weight" in state,
             "final_norm": "final_layer_norm.weight" in state}
    ours, mask = {"encoder.embedding.cls": cls}, state.pop("embedding.mask_token_embedding", torch.zeros(1, E))
    if shape["use_dom_positions"]:
        ours["encoder.embedding.geometry"] = state.pop("embedding.dom_positions")[1:] * POSITION_SCALE
        ours["encoder.embedding.special"] = torch.cat([mask, mask])  # padding is seen by nobody
    else:
        table = torch.cat([state.pop("embedding.dom_embedding.weight"), mask])[:N_DOMS + 2]
        ours["encoder.embedding.dom_table.weight"] = torch.cat([table[1:], table[:1]])  # DOMs, mask, padding
    renamed = {"embedding.features_embedding": "encoder.embedding.features", "final_layer_norm": "encoder.final_norm",
               "embedding.position_embedding": "encoder.embedding.position", "charge_prediction": "charge_head",
               "unembedding": "dom_head"}
    for i in range(n_layers):
        theirs, block = f"transformer_blocks.{i}", f"encoder.backbone.blocks.{i}"
        ours[f"{block}.mixer.qkv.weight"] = torch.cat([state.pop(f"{theirs}.attention.w{x}.weight") for x in "qkv"])
        renamed |= {f"{theirs}.attention.wo": f"{block}.mixer.out", f"{theirs}.feed_forward.0": f"{block}.mlp.up",
                    f"{theirs}.feed_forward.2": f"{block}.mlp.down", f"{theirs}.layer_norm1": f"{block}.norm1",
                    f"{theirs}.layer_norm2": f"{block}.norm2"}
    for name, value in state.items():
        module, _, kind = name.rpartition(".")
        ours[f"{renamed[module]}.{kind}"] = value[1:] if module == "unembedding" else value
    return shape, ours


def load_encoder(model, saved, path):
    """Copy the encoder of a pretrained (or fine-tuned) checkpoint. The head stays new, everything else must be there."""
    encoder = {name: value for name, value in saved["model"].items() if name.startswith("encoder.")}
    missing, unexpected = model.load_state_dict(encoder, strict=False)
    new_head = [name for name in model.state_dict() if not name.startswith("encoder.")]
    # DIFF(upstream): strict=False there, whatever is missing stays random without a word
    if missing != new_head or unexpected:
        common.fail(f"{path}: its encoder is not complete: missing {sorted(set(missing) - set(new_head))}, not known {unexpected}")


def head_and_encoder(model, config):
    """parameter_groups, those of the head with head_lr_factor times the learning rate."""
    head = {id(parameter) for parameter in model.head.parameters()}
    groups = []
    for group in parameter_groups(model, config.weight_decay):
        for is_head, factor in ((False, 1.0), (True, config.head_lr_factor)):
            params = [parameter for parameter in group["params"] if (id(parameter) in head) == is_head]
            groups.append({**group, "params": params, "lr_scale": group["lr_scale"] * factor})
    return [group for group in groups if group["params"]]


def ran_out_of_patience(step, best_step, config):
    return config.patience > 0 and step - best_step >= config.patience * config.eval_interval


# ----------------------------------------------------------------------------------------------------------------------
# losses and predictions
# ----------------------------------------------------------------------------------------------------------------------

def event_losses(outputs, batch, config):
    """What the model is trained on, for each event of a batch, (B,)."""
    if config.task == "energy":
        return (outputs["log_energy"] - torch.log10(batch["energy"])).square()  # [dex^2]
    truth = unit_vector(batch["azimuth"], batch["zenith"])
    return sum(DIRECTION_LOSSES[name](outputs["direction"], outputs["kappa"], truth) for name in config.direction_loss.split("+"))


def line_fit(batch, geometry):
    """The baseline: fit position = r + v time to the good pulses, weighted by charge -> unit vectors (B, 3) along -v.

    IceCube's first guess (astro-ph/0407044, section 3.1.3); 1.18 rad on average on Kaggle's data. 0 where no fit is possible.
    """
    weight = batch["charge"] * (batch["valid"] & ~batch["aux"])  # (B, L)
    time = batch["time"] - (weight * batch["time"]).sum(1, keepdim=True) / weight.sum(1, keepdim=True).clamp(min=1e-6)
    velocity = ((weight * time)[..., None] * geometry[batch["dom"]]).sum(1)  # times a positive number
    return F.normalize(-velocity, dim=-1)


def vmf_quantile(direction, kappa, truth):
    """The probability inside the contour around the prediction that goes through the truth: uniform in 0..1 if kappa is right."""
    return torch.expm1(-kappa * one_minus_cosine(direction, truth)) / torch.expm1(-2 * kappa)


def event_batches(split, index, n, shift=None):
    """Events as micro-batches; shift [ns] (one an event) moves their pulses in time."""
    events, pulses = data.read_events(split, index)
    if shift is not None:
        pulses = pulses.copy()
        pulses["time"] += np.repeat(shift, events["length"])
    return data.micro_batches(events, pulses, n)


@torch.no_grad()
def predict(model, split, n_events, config, ranks, autocast):
    """Go through this rank's share of the first n_events, in their order: yields index (n,) and a dict of numpy arrays (n, ...).

    They are the model's outputs, line_fit, and where labels are known the loss; a batch at a time, whatever n_events is.
    """
    first, last = np.linspace(0, n_events, ranks.world_size + 1).astype(np.int64)[ranks.rank:ranks.rank + 2].tolist()
    edges = np.linspace(first, last, -(-(last - first) * ranks.world_size // config.batch_size) + 1).astype(np.int64)
    model.eval()
    with common.progress_bar(last - first, f"predict {split.path}", "event") as bar:
        loader = data.prefetch(lambda i: event_batches(split, np.arange(edges[i], edges[i + 1]), config.micro_batches),
                               range(len(edges) - 1), ranks.device)  # a rank may have no event
        for i, batches in enumerate(loader):
            index, arrays = np.arange(edges[i], edges[i + 1]), {}
            for batch in batches:
                with autocast:
                    outputs = model(batch)
                losses = event_losses(outputs, batch, config)
                for name, value in {**outputs, "loss": losses, "line_fit": line_fit(batch, model.encoder.embedding.geometry)}.items():
                    value = value.float().cpu().numpy()
                    arrays.setdefault(name, np.empty((len(index), *value.shape[1:]), np.float32))[batch["row"].cpu().numpy()] = value
            yield index, arrays
            bar.update(len(index))
    model.train()


def prediction_table(events, arrays, config, known):
    """What is written of some events: angles as Kaggle wants them, azimuth in [0, 2 pi), zenith in [0, pi], and the truth.

    known: which of azimuth, zenith, energy, event_class the split has; as true_azimuth, ... they stand beside.
    """
    columns = {"event_id": events["event_id"]}
    if config.task == "energy":
        columns["energy"] = 10.0 ** arrays["log_energy"].astype(np.float64)
    else:
        x, y, z = arrays["direction"].T.astype(np.float64)
        azimuth = np.arctan2(y, x) % (2 * np.pi)
        azimuth[azimuth >= 2 * np.pi] = 0.0  # a tiny negative angle plus 2 pi rounds up to 2 pi
        columns |= {"azimuth": azimuth, "zenith": np.arccos(np.clip(z, -1, 1)), "x": x, "y": y, "z": z}
        if "vmf" in config.direction_loss:
            columns["kappa"] = arrays["kappa"]
    columns["n_pulses"] = events["n_pulses"]
    return pa.table(columns | {f"true_{name}": np.ascontiguousarray(events[name]) for name in known})


def join_predictions(path, n_ranks):
    """Put the files that the ranks wrote one after another; a .csv gets the columns of a Kaggle submission."""
    parts = [f"{path}.rank{rank}" for rank in range(n_ranks)]
    writer = pyarrow.csv.CSVWriter if path.endswith(".csv") else pq.ParquetWriter

    def write(part):
        schema = pq.read_schema(parts[0])
        wanted = ["event_id", "azimuth", "zenith", "energy"] if path.endswith(".csv") else schema.names
        columns = [name for name in schema.names if name in wanted]
        with writer(part, pa.schema([schema.field(name) for name in columns])) as file:
            for name in parts:
                for batch in pq.ParquetFile(name).iter_batches(columns=columns):
                    file.write_batch(batch)
    common.write_atomic(path, write)
    n_events = sum(pq.read_metadata(name).num_rows for name in parts)
    for name in parts:
        os.remove(name)
    print(f"predictions of {n_events:,} events in {path}")


# ----------------------------------------------------------------------------------------------------------------------
# evaluation
# ----------------------------------------------------------------------------------------------------------------------

def find_unlabelled(split, n_events, config):
    """Places of those among the first n_events that lack a label of the task."""
    return np.flatnonzero(np.any([np.isnan(split.events[label][:n_events]) for label in LABELS[config.task]], axis=0))


def evaluate(model, split, n_events, config, ranks, autocast, predictions=""):
    """Predict the first n_events and, if they have labels, score them -> dict of arrays (n_events,), on every rank, or {}.

    loss; "direction": error, fit_error (of the line fit) [rad], quantile (see vmf_quantile); "energy": error [dex].
    predictions: a file to write them to; all ranks work, none of them holds more than a batch and the scores.
    """
    is_labelled = len(find_unlabelled(split, n_events, config)) == 0
    scores, writer, part = [], None, f"{predictions}.rank{ranks.rank}"
    if predictions:  # a rank may have no event: its file is begun with an empty table
        nothing = {"log_energy": np.empty(0), "direction": np.empty((0, 3)), "kappa": np.empty(0, np.float32)}
        known = [name for name in ("azimuth", "zenith", "energy") if not np.isnan(split.events[name][:n_events]).all()]
        if split.events["event_class"][:n_events].any():
            known.append("event_class")
        try:
            writer = pq.ParquetWriter(part, prediction_table(split.events[:0], nothing, config, known).schema)
        except OSError as error:
            common.fail(f"{predictions}: cannot be written ({error}); choose another file for predictions")
    for index, arrays in predict(model, split, n_events, config, ranks, autocast):
        events = split.events[index]
        if is_labelled:
            scores.append(score(arrays, events, config))
        if writer:
            try:
                writer.write_table(prediction_table(events, arrays, config, known))
            except OSError as error:
                common.fail(f"{part}: cannot be written ({error}); make room or choose another file for predictions")
    if writer:
        writer.close()
        common.wait_for_all(ranks)
        if ranks.main:
            join_predictions(predictions, ranks.world_size)
    if not is_labelled:
        return {}
    names = ("loss", "error") + ("fit_error", "quantile") * (config.task == "direction")
    mine = np.array([np.concatenate([part[name] for part in scores] or [np.empty(0, np.float32)]) for name in names])
    return dict(zip(names, common.gather_over_ranks(mine.T, ranks).T))


def score(arrays, events, config):
    if config.task == "energy":
        return {"loss": arrays["loss"], "error": arrays["log_energy"] - np.log10(events["energy"])}
    truth = unit_vector(*(torch.from_numpy(events[angle].copy()) for angle in ("azimuth", "zenith")))
    direction, kappa, fit = (torch.from_numpy(arrays[name]) for name in ("direction", "kappa", "line_fit"))
    return {"loss": arrays["loss"], "error": angular_error(direction, truth).numpy(), "fit_error": angular_error(fit, truth).numpy(),
            "quantile": vmf_quantile(direction, kappa, truth).numpy()}


def summary(scores, config):
    """The val_* columns of log.csv."""
    error = scores["error"].astype(np.float64)
    if config.task == "energy":
        return {"val_loss": scores["loss"].mean(dtype=np.float64).item(), "val_bias": error.mean().item(),
                "val_resolution": error.std().item()}
    return {"val_loss": scores["loss"].mean(dtype=np.float64).item(), "val_angle_mean": error.mean().item(),
            "val_angle_median": np.median(error).item()}


STATISTICS = {"direction": {"mean": np.mean, "median": np.median, "68 %": lambda error: np.quantile(error, 0.68)},
              "energy": {"bias": np.mean, "resolution": np.std}}
N_BOOTSTRAP = 100  # resamplings of the events: the spread of a statistic over them is its error, good to 7 %
MIN_EVENTS = 10  # a smaller bin is not shown, and of fewer events no error is estimated
LEVELS = np.linspace(0.05, 0.95, 19)  # of probability, at which the contours are checked


def bins_of(events):
    """(kind, label, mask) of the groups of events that are looked at on their own; unknown energies and classes give none."""
    yield "all", "all", np.ones(len(events), bool)
    for number, name in ((1, "track"), (2, "cascade")):
        yield "class", name, events["event_class"] == number
    for low in range(0, 8):
        yield "energy", f"1e{low} to 1e{low + 1} GeV", (events["energy"] >= 10.0**low) & (events["energy"] < 10.0**(low + 1))
    for low, high in ((1, 32), (32, 64), (64, 128), (128, 256), (256, 1024), (1024, 2**32)):
        yield "pulses", f"{low} to {high - 1}" if high < 2**32 else f"{low} or more", \
            (events["n_pulses"] >= low) & (events["n_pulses"] < high)
    for low in (0, 60, 120):
        zenith = np.degrees(events["zenith"])
        yield "zenith", f"{low} to {low + 60} deg", (zenith >= low) & (zenith < low + 60 + (low == 120))


def evaluation_table(scores, events, config):
    """Rows (dicts) for all events and in bins -> rows, and those left out as they have fewer than MIN_EVENTS.

    A row has n, each statistic with its bootstrap error (None for too few events), beside it that of the line fit.
    """
    rng, rows, left_out = np.random.default_rng(0), [], []
    for kind, label, mask in bins_of(events):
        n = int(mask.sum())
        row = {"kind": kind, "bin": label, "n": n}
        if kind != "all" and n < MIN_EVENTS:
            left_out.append(row)
            continue
        error = scores["error"][mask]
        resampled = [error[rng.integers(n, size=n)] for _ in range(N_BOOTSTRAP)]
        for name, statistic in STATISTICS[config.task].items():
            row[name] = float(statistic(error))
            spread = float(np.std([statistic(sample) for sample in resampled]))
            row[f"{name}_error"] = spread if n >= MIN_EVENTS else None
        if config.task == "direction":
            fit = scores["fit_error"][mask]
            row |= {"line_fit_mean": float(fit.mean()), "line_fit_median": float(np.median(fit))}
        rows.append(row)
    return rows, left_out


def print_evaluation(rows, left_out, config):
    unit = "rad" if config.task == "direction" else "dex"
    names = list(STATISTICS[config.task])
    head = f"{'':<8}{'':<18}{'events':>9}" + "".join(f"{f'{name} [{unit}]':>20}" for name in names)
    if config.task == "direction":
        head += f"{'line fit mean':>16}{'median [rad]':>14}"
    print(head)
    for row in rows:
        cells = "".join(f"{with_error(row, name, '.4g', '.2g'):>20}" for name in names)
        if config.task == "direction":
            cells += f"{row['line_fit_mean']:>16.4g}{row['line_fit_median']:>14.4g}"
        print(f"{row['kind']:<8}{row['bin']:<18}{row['n']:>9,}{cells}")
    small = [f"{row['kind']} {row['bin']} ({row['n']})" for row in left_out if row["n"]]
    if small:
        print(f"not shown, fewer than {MIN_EVENTS} events: {', '.join(small)}")


def with_error(row, name, form, error_form):
    """A statistic as text, with its error where that is known."""
    error = row[f"{name}_error"]
    return f"{row[name]:{form}}" if error is None else f"{row[name]:{form}} +- {error:{error_form}}"


def report(scores, events, config, path, saved):
    """Print the table of a checkpoint's errors -> what result.txt and evaluation_<split>.json hold."""
    rows, left_out = evaluation_table(scores, events, config)
    whole = rows[0]
    start = f"pretrained {saved['config']['pretrained']}" if saved["config"]["pretrained"] else "from scratch"
    result = f"{path} | {start} | {saved['n_train']:,} labels | {len(events):,} events of {config.val_split} | " + (
        f"angular error mean {with_error(whole, 'mean', '.4f', '.4f')} rad, median {whole['median']:.4f} rad"
        if config.task == "direction" else
        f"log10(energy) bias {with_error(whole, 'bias', '+.4f', '.4f')}, resolution {whole['resolution']:.4f} dex")
    content = {"checkpoint": Path(path).name, "step": saved["step"], "pretrained": saved["config"]["pretrained"],
               "freeze_backbone": saved["config"]["freeze_backbone"], "n_train": saved["n_train"], "task": config.task,
               "direction_loss": config.direction_loss, "data_dir": config.data_dir,
               "data": data.fingerprint(config.data_dir), "split": config.val_split, "n_events": len(events),
               "errors_by": f"{N_BOOTSTRAP} bootstrap samples of the events", "rows": rows, "left_out": left_out}
    print_evaluation(rows, left_out, config)
    edges = np.linspace(0, np.pi, 61) if config.task == "direction" else np.linspace(-2, 2, 61)  # [rad], [dex]
    content["histogram"] = {"edges": edges.tolist(), **{name: np.histogram(scores[name], edges)[0].tolist()
                                                        for name in ("error", "fit_error") if name in scores}}
    if config.task == "direction" and "vmf" in config.direction_loss:
        inside = [float((scores["quantile"] < level).mean()) for level in LEVELS]
        content["calibration"] = {"level": LEVELS.tolist(), "inside": inside}
        print(f"calibration: {np.interp(0.5, LEVELS, inside):.1%} of the events lie inside their 50 % contour, "
              f"{np.interp(0.9, LEVELS, inside):.1%} inside that of 90 %")
    print(result)
    return result, content


def evaluation_path(path, saved, config, n_val, n_split):
    """Where the evaluation of a checkpoint is kept, beside it: the plain name is for best.pt on the events of its run.

    These are the first val_events of its val_split, or all of another split of its data; other names say what differs.
    """
    run = saved["config"]
    n_run = min(run["val_events"] or n_split, n_split) if config.val_split == run["val_split"] else n_split
    name = f"evaluation_{config.val_split}"
    if Path(path).stem != "best":
        name += f"_{Path(path).stem}"
    fingerprint = data.fingerprint(config.data_dir)
    if saved.get("data", fingerprint) != fingerprint:
        name += f"_{Path(config.data_dir).absolute().name}"
    if n_val != n_run:
        name += f"_{n_val}"
    return Path(path).parent / f"{name}.json"


# ----------------------------------------------------------------------------------------------------------------------
# export
# ----------------------------------------------------------------------------------------------------------------------

def export_model(path, model):
    """Write the model for use without this repository: torch.export.load(path).module()(pulses, valid).

    pulses: dict of time [ns], charge [p.e.] float32, dom int64 (sensor_id), aux bool, each (B, L); valid bool (B, L). Float32,
    for any B and L.
    """
    class Exported(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, pulses, valid):
            return {name: value.detach() for name, value in self.model({**pulses, "valid": valid}).items()}

    kinds = {"time": torch.float32, "charge": torch.float32, "dom": torch.int64, "aux": torch.bool}
    pulses = {name: torch.zeros(2, 3, dtype=kind) for name, kind in kinds.items()}  # any shape does
    shape = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    program = torch.export.export(Exported().eval(), (pulses, torch.ones(2, 3, dtype=torch.bool)),
                                  dynamic_shapes={"pulses": {name: shape for name in pulses}, "valid": shape})

    def write(part):
        with open(part, "wb") as file:
            torch.export.save(program, file)
    common.write_atomic(path, write)
    print(f"exported to {path}")


# ----------------------------------------------------------------------------------------------------------------------

def main():
    config = knobs.load_config(FinetuneConfig, __doc__)
    ranks = common.start_device(config)
    autocast = torch.autocast(ranks.device.type, ranks.dtype, enabled=ranks.dtype != torch.float32)
    architecture = [field.name for field in dataclasses.fields(ModelConfig)]
    checkpoint_path, best_path = f"{config.out_dir}/ckpt.pt", f"{config.out_dir}/best.pt"

    # ---- data --------------------------------------------------------------------------------------------------------
    geometry = data.read_geometry(config.data_dir)
    val_split, n_val = data.open_first_events(config.data_dir, config.val_split, config.val_events, at_most=True)
    fingerprint = data.fingerprint(config.data_dir)

    def evaluate_best(path, saved):
        """Evaluate a fine-tuned checkpoint, print and keep the result, write the predictions."""
        data.check_geometry(saved, geometry, path, config.data_dir)
        model = Reconstructor(config, geometry)
        model.load_state_dict(saved["model"])
        if config.export and ranks.main:
            export_model(config.export, model)
        scores = evaluate(model.to(ranks.device), val_split, n_val, config, ranks, autocast, config.predictions)
        if ranks.main and scores:
            result, content = report(scores, val_split.events[:n_val], config, path, saved)
            common.write_json(evaluation_path(path, saved, config, n_val, len(val_split)), content)
            if not config.eval_only:
                common.write_atomic(Path(path).parent / "result.txt", lambda part: part.write_text(result + "\n"))

    if config.eval_only:
        path = config.checkpoint or best_path
        saved = common.load_checkpoint(path)
        take_architecture(config, saved, path, [*architecture, "head_hidden_size", "task", "direction_loss"])
        if len(find_unlabelled(val_split, n_val, config)) and not (config.predictions or config.export):
            common.fail(f"{val_split.path} has no labels of the {config.task} to evaluate with; name a file to write: --predictions=")
        if config.export and config.backbone == "gru":
            common.fail("export: torch.export cannot take a GRU for events of any length (torch 2.13); transformer and mamba can")
        evaluate_best(path, saved)
        common.stop_device(ranks)
        return

    train_split, n_train = data.open_first_events(config.data_dir, config.train_split, config.train_events)
    for split, n in ((train_split, n_train), (val_split, n_val)):
        unlabelled = find_unlabelled(split, n, config)
        if len(unlabelled):
            common.fail(f"{split.path}: {len(unlabelled):,} of {n:,} events have no {config.task}, the first is event "
                        f"{split.events['event_id'][unlabelled[0]]}; choose a labelled split (or --eval_only=True to predict)")

    def load_step(step):
        """This rank's share of a step; the step's events and shifts do not depend on the number of ranks."""
        index, epoch = data.step_events(step, config.batch_size, n_train, config.seed)
        shift = None
        if config.time_offset_std:  # two uniform numbers make a normal one (Box & Muller)
            u, v = (data.uniform_hash(config.seed, epoch, 2 * index + i) for i in (0, 1))
            shift = (config.time_offset_std * np.sqrt(-2 * np.log1p(-u)) * np.cos(2 * np.pi * v)).astype(np.float32)
            shift = np.array_split(shift, ranks.world_size)[ranks.rank]
        return event_batches(train_split, np.array_split(index, ranks.world_size)[ranks.rank], config.micro_batches, shift)

    # ---- model, optimizer, resume, compile, DDP ----------------------------------------------------------------------
    pretrained, is_started = None, os.path.exists(checkpoint_path)
    if config.pretrained:
        begin = checkpoint_path if is_started else config.pretrained  # a run that goes on has all that it needs
        pretrained = common.load_checkpoint(begin) if is_started else load_pretrained(begin, config, geometry, config.data_dir)
        take_architecture(config, pretrained, begin, architecture)
    saved = common.find_run(config, checkpoint_path, MAY_CHANGE)
    if saved:
        common.check_same(checkpoint_path, "labels in train_split", saved["n_train"], n_train)
        data.check_geometry(saved, geometry, checkpoint_path, config.data_dir)
        data.check_events(saved, checkpoint_path, config.data_dir)
        if saved["step"] >= config.max_steps or ran_out_of_patience(saved["step"], saved["best_step"], config):
            if ranks.main:
                print(f"{config.out_dir} is complete at step {saved['step']}; raise max_steps (or patience, if that ended it) "
                      "to go on, or choose another out_dir")
            if not os.path.exists(best_path):
                common.fail(f"{best_path} is missing; the last weights can be evaluated with: python finetune.py "
                            f"--eval_only=True --data_dir={config.data_dir} --checkpoint={checkpoint_path}")
            evaluate_best(best_path, common.load_checkpoint(best_path))
            common.stop_device(ranks)
            return

    torch.manual_seed(config.seed)
    raw_model = Reconstructor(config, geometry)
    if pretrained and not saved:
        load_encoder(raw_model, pretrained, config.pretrained)
    raw_model.encoder.requires_grad_(not config.freeze_backbone)
    raw_model.to(ranks.device)
    optimizer = torch.optim.AdamW(head_and_encoder(raw_model, config), lr=config.learning_rate,
                                  betas=(config.beta1, config.beta2), eps=config.adam_eps, fused=True)
    scaler = torch.amp.GradScaler(ranks.device.type, init_scale=2.0**10, enabled=ranks.dtype == torch.float16)
    first_step, best_val, best_step = 0, float("inf"), 0
    bad_steps = bad_in_a_row = torch.zeros((), dtype=torch.int64, device=ranks.device)  # counted without waiting for the GPU
    if saved:
        raw_model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        if saved["scaler"] and scaler.is_enabled():
            scaler.load_state_dict(saved["scaler"])
        first_step, best_val, best_step = saved["step"], saved["best_val"], saved["best_step"]
        bad_steps = bad_steps + saved["bad_steps"]
    compiled_model = torch.compile(raw_model, dynamic=True) if config.compile else raw_model
    model = DistributedDataParallel(compiled_model) if ranks.world_size > 1 else compiled_model

    def save(path, step):
        common.save_checkpoint(path, model=raw_model.state_dict(), optimizer=optimizer.state_dict(),
                               scaler=scaler.state_dict(), step=step, best_val=best_val, best_step=best_step,
                               bad_steps=bad_steps.item(), n_train=n_train, data=fingerprint,
                               config=dataclasses.asdict(config))

    if ranks.main:
        lock = common.hold_lock(config.out_dir)  # held until main() ends
        knobs.print_knobs(config)
        common.print_run_header(config, ranks, raw_model, n_train)
        common.write_json(f"{config.out_dir}/config.json", dataclasses.asdict(config))
        log = common.start_log(config, LOG_COLUMNS, first_step)
        if saved:
            common.print_reheating(saved, config)
            print(f"resume from {checkpoint_path} at step {first_step}")

    # ---- training loop -----------------------------------------------------------------------------------------------
    bar = common.progress_bar(config.max_steps, "finetune", "step", initial=first_step)
    loader = data.prefetch(load_step, range(first_step, config.max_steps), ranks.device)
    clock, clock_step, waited = time.perf_counter(), first_step, 0.0
    caught, asked_to_stop = common.catch_signals(), False
    for step in range(first_step, config.max_steps + 1):  # one extra turn to evaluate and save
        last_step = step == config.max_steps
        row = {"step": step, "events": step * config.batch_size}
        if asked_to_stop and not last_step:
            if ranks.main:
                save(checkpoint_path, step)
            bar.close()
            common.end_stopped_run(config, caught, step, ranks)

        paused = time.perf_counter()
        if step % config.eval_interval == 0 or last_step:
            row |= summary(evaluate(raw_model, val_split, n_val, config, ranks, autocast), config)
            if ranks.main:
                bar.write(f"eval {step:6d}/{config.max_steps} | " + " ".join(f"{name} {value:.4f}" for name, value in row.items()
                                                                             if name.startswith("val_")))
            if not np.isfinite(row["val_loss"]):
                common.fail(f"step {step}: val_loss is {row['val_loss']}; {config.out_dir} keeps the last good "
                            "checkpoint, go on with a smaller learning_rate", common.Diverged)
            if row["val_loss"] < best_val and step > 0:
                best_val, best_step = row["val_loss"], step
                if ranks.main:
                    save(best_path, step)
            if ran_out_of_patience(step, best_step, config) and not last_step:
                last_step = True
                if ranks.main:
                    bar.write(f"no lower val_loss than at step {best_step} in patience = {config.patience} "
                              "evaluations: this is the end")
        if ranks.main and (step % config.save_interval == 0 or last_step):
            save(checkpoint_path, step)
        clock += time.perf_counter() - paused  # evaluating and saving do not count as training
        if last_step:
            if ranks.main:
                log(row)
            break

        row["lr"] = common.learning_rate(step, config)
        for group in optimizer.param_groups:
            group["lr"] = row["lr"] * group["lr_scale"]  # 1 without muP
        called = time.perf_counter()
        batches = next(loader)
        waited += time.perf_counter() - called
        asked_to_stop, = common.sum_over_ranks([bool(caught)], ranks)  # any rank: then all do, after this step
        step_loss = 0.0
        for i, batch in enumerate(batches):
            # gradients are summed over ranks only after the last micro-batch
            syncs = nullcontext() if ranks.world_size == 1 or i == len(batches) - 1 else model.no_sync()
            with syncs:
                with autocast:
                    outputs = model(batch)
                loss = event_losses(outputs, batch, config).sum() / config.batch_size  # a share of the whole step's mean
                scaler.scale(loss * ranks.world_size).backward()  # DDP takes the mean over ranks, the sum is meant
            step_loss += loss.detach()
        scaler.unscale_(optimizer)
        grad_norm = torch.nn.utils.clip_grad_norm_(raw_model.parameters(), config.grad_clip)
        is_bad = ~grad_norm.isfinite()
        optimizer.found_inf = is_bad.float()  # on the device: the fused kernel then changes nothing
        scaler.step(optimizer)
        scaler.update()
        raw_model.zero_grad(set_to_none=True)
        bad_steps = bad_steps + is_bad
        too_bad = bad_in_a_row > config.max_bad_steps  # stays so until the next log line looks at it
        bad_in_a_row = torch.where(too_bad, bad_in_a_row, (bad_in_a_row + 1) * is_bad)

        if step % config.log_interval == 0:
            row["loss"], = common.sum_over_ranks(step_loss[None], ranks)  # waits for the GPU
            now, n_steps = time.perf_counter(), step + 1 - clock_step
            row |= {"grad_norm": grad_norm.item(), "events_per_s": n_steps * config.batch_size / (now - clock),
                    "data_ms": waited / n_steps * 1e3, "bad_steps": bad_steps.item()}
            if ranks.main:
                bar.write(f"step {step:6d}/{config.max_steps} | loss {row['loss']:.4f} | norm {row['grad_norm']:.2f} | "
                          f"lr {row['lr']:.1e} | {(now - clock) / n_steps * 1e3:.1f} ms, data {row['data_ms']:.1f} | "
                          f"{row['events_per_s']:,.0f} events/s" + f" | {row['bad_steps']} steps skipped" * (row["bad_steps"] > 0))
            if bad_in_a_row > config.max_bad_steps:
                with torch.no_grad(), autocast:
                    losses = np.concatenate([event_losses(raw_model(batch), batch, config).cpu().numpy() for batch in batches])
                event_ids = np.concatenate([batch["event_id"].cpu().numpy() for batch in batches])
                common.stop_bad_run(config, step, losses, event_ids, ranks)
            clock, clock_step, waited = now, step + 1, 0.0
        if ranks.main and (step % config.log_interval == 0 or "val_loss" in row):
            log(row)
        bar.update()

    bar.close()
    common.release_signals()
    common.wait_for_all(ranks)  # rank 0 may still be writing best.pt
    evaluate_best(best_path, common.load_checkpoint(best_path))
    common.stop_device(ranks)


if __name__ == "__main__":
    common.run_stage(main)
