"""How a run of train.py or finetune.py begins: plumbing that a reader may skip.

The knobs that both stages have; which checkpoint a run begins from, and whether it may; what is printed
before the first step.
"""
import dataclasses
import importlib.util
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import torch

import common
import data
import knobs
from model import ModelConfig


@dataclass
class RunConfig:
    """The knobs of train.py and finetune.py that do not touch what a model learns."""
    out_dir: str = ""  # where the run is kept; "" = out/<stems of the config files joined by +>
    micro_batch_size: int = 0  # events computed at once, which changes no result; 0 = what suits the device
    eval_interval: int = 1000  # steps between evaluations
    log_interval: int = 50  # steps between log lines
    save_interval: int = 1000  # steps between checkpoints
    max_bad_steps: int = 20  # a run ends after more gradients in a row than this that are not finite
    resume: bool = True  # go on from out_dir/ckpt.pt if there is one; False refuses a folder that holds a run
    device: str = "auto"  # or "cuda", "mps", "cpu"
    dtype: str = "auto"  # "bfloat16", "float16", "float32"; auto = bfloat16 where the hardware has it
    compile: bool = False  # torch.compile: 1.4 times as fast on a GPU, first step a minute; not on a CPU
    wandb_project: str = ""  # also log to this project of Weights & Biases; "" = off

    def check(self):
        """Of these knobs, and of those of the loop that each stage has with a default of its own."""
        yield from knobs.check_positive(self, "batch_size", "max_steps", "learning_rate", "adam_eps",
                                        "grad_clip", "eval_interval", "log_interval", "save_interval")
        yield from knobs.check_not_negative(self, "train_events", "val_events", "warmup_steps",
                                            "cooldown_steps", "weight_decay", "max_bad_steps", "seed",
                                            "micro_batch_size")
        yield from knobs.check_fraction(self, "beta1", "beta2")
        yield from knobs.check_choice(self, "schedule", ("trapezoidal", "cosine", "constant"))
        yield from knobs.check_device(self)
        if self.wandb_project and importlib.util.find_spec("wandb") is None:
            yield (f"wandb_project = {self.wandb_project!r} needs the package wandb: pip install wandb, or "
                   "leave it empty; log.csv is written in any case")
        world_size = int(os.environ.get("WORLD_SIZE", 1))
        if self.batch_size < world_size:
            yield f"batch_size = {self.batch_size} is too small for {world_size} ranks"


# Knobs that may differ when a run goes on: the steps already done would have been the same but for rounding,
# and for the learning rate's end, which max_steps and cooldown_steps move
MAY_CHANGE = {"data_dir", "out_dir", "micro_batch_size", "max_steps", "cooldown_steps", "eval_interval",
              "log_interval", "save_interval", "keep_every", "patience", "max_bad_steps", "resume", "device",
              "dtype", "compile", "wandb_project"}


# ------------------------------------------------------------------------------------------------------------
# what a run begins from
# ------------------------------------------------------------------------------------------------------------

def load_pretrained(config):
    """The checkpoint `pretrained`, None if that is empty; sets the architecture in config to the same.

    If the run goes on, its own checkpoint tells the architecture and is what is loaded.
    """
    if not config.pretrained:
        return None
    path = f"{config.out_dir}/ckpt.pt"
    if not os.path.exists(path):
        path = config.pretrained
    pretrained = common.load_checkpoint(path)
    if "task" in pretrained["config"] and not hasattr(config, "task"):
        common.fail(f"{path} is a fine-tuned checkpoint; begin with one of train.py")
    knobs.take_architecture(config, ModelConfig, pretrained, path)
    for complaint in config.check():
        common.fail(f"{path}: {complaint}")
    return pretrained


def find_run(config):
    """The checkpoint in out_dir to go on from, with its "path"; or None to start.

    Exits if the knobs forbid to go on, or differ.
    """
    path, record, saved = f"{config.out_dir}/ckpt.pt", f"{config.out_dir}/config.json", None
    if os.path.exists(path):
        saved = common.load_checkpoint(path) | {"path": path}
    left = [name for name in ("best.pt", "log.csv") if has_content(f"{config.out_dir}/{name}")]
    if saved is None and left:
        common.fail(f"{path} is missing, but {config.out_dir} holds {' and '.join(left)} of a run, which "
                    "starting anew would overwrite; put ckpt.pt back (a copy of best.pt serves as well), or "
                    f"move {config.out_dir} away")
    if saved is None and not os.path.exists(record):
        return None
    if not config.resume:
        common.fail(f"{config.out_dir} holds a run; go on with --resume=True, or choose another out_dir")
    if saved:
        check_knobs(config, saved["config"], path, MAY_CHANGE)
    else:  # stopped before its first checkpoint
        check_knobs(config, common.read_json(record), record, MAY_CHANGE)
    return saved


def find_branch(config, saved, warmup_steps):
    """Where a run with branch_from begins -> its own checkpoint, or that of the long run; sets max_steps.

    One long run with a constant learning rate gives a whole curve over training time, if a cooldown branches
    off at several steps (Hägele et al. 2024, arXiv:2405.18392). saved: what find_run found.
    """
    path = config.branch_from
    config.sources["max_steps"] = path
    if saved:  # the branch goes on
        check_same(saved["path"], "cooldown_steps", saved["config"]["cooldown_steps"], config.cooldown_steps)
        config.max_steps = saved["config"]["max_steps"]
        return saved
    origin = common.load_checkpoint(path)
    if "task" in origin["config"]:
        common.fail(f"{path} is a fine-tuned checkpoint; a branch begins from one of train.py")
    check_knobs(config, origin["config"], path, MAY_CHANGE | {"branch_from", "pretrained"})
    last = origin["config"]["max_steps"] - origin["config"]["cooldown_steps"]
    if warmup_steps > last:
        common.fail(f"{path}: its run has no flat part to branch from: a warm-up of {warmup_steps} steps, "
                    f"and a cooldown from step {last} on; branch from a longer run, or one with a shorter "
                    "warm-up")
    if not warmup_steps <= origin["step"] <= last:
        common.fail(f"{path} is at step {origin['step']}, outside the flat part of its schedule, steps "
                    f"{warmup_steps} to {last}; set keep_every in the long run and branch from one of those "
                    "checkpoints")
    config.max_steps = origin["step"] + config.cooldown_steps
    return origin | {"path": path, "best_val": float("inf")}


def check_ranks(config, saved, process):
    """End a run whose ranks begin at other steps or with other data, as their folders are not the same."""
    begin = [saved["step"] if saved else 0, int(data.fingerprint(config.data_dir), 16)]
    n = process.world_size
    if n > 1 and common.sum_over_ranks(begin, process) != [n * number for number in begin]:
        common.fail(f"the ranks do not find the same in {config.out_dir} and {config.data_dir}; put both on "
                    "a disk that all machines share, and give every rank the same paths")


def has_content(path):
    """Whether there is such a file; a log.csv needs a row below its header."""
    if not path.endswith(".csv"):
        return os.path.exists(path)
    return os.path.exists(path) and Path(path).read_bytes().count(b"\n") > 1


def check_knobs(config, known, path, may_change):
    """A run goes on, or branches, with the knobs that it had. known: those, a dict."""
    for field in dataclasses.fields(config):
        if field.name not in may_change:  # a knob that is younger than the run was at its default
            before = known.get(field.name, common.default_of(field))
            check_same(path, field.name, before, getattr(config, field.name))


def check_same(path, what, before, now):
    if before != now:
        common.fail(f"{path} was written with {what} = {before!r}, now it is {now!r}; set it back, or start "
                    "another run in another out_dir")


def check_data(saved, config, n_train, geometry, fingerprint):
    """A run must find the detector and the events that it began with. saved: from find_run or find_branch."""
    path = saved["path"]
    check_same(path, "events in train_split", saved["n_train"], n_train)
    common.check_geometry(saved, geometry, path, config.data_dir)
    if saved.get("data", fingerprint) != fingerprint:  # old checkpoints do not tell
        common.fail(f"{path} was trained on other events than {config.data_dir} holds (their meta.json "
                    "differ); choose the data_dir it belongs to, or another out_dir")


# ------------------------------------------------------------------------------------------------------------
# what is printed before the first step
# ------------------------------------------------------------------------------------------------------------

def start_run(config, process, model, n_train, saved, columns):
    """Print what a log needs to be reproducible, keep the knobs -> lock of the folder; log(row), for log.csv.

    saved: the checkpoint it begins from, or None; columns: those of log.csv. Only rank 0 has both to do.
    """
    if not process.is_main:
        return None, lambda row: None
    lock = common.hold_lock(config.out_dir)
    knobs.print_knobs(config)
    print_header(config, process, model, n_train)
    common.write_json(f"{config.out_dir}/config.json", dataclasses.asdict(config))
    if saved:
        is_branch = saved["path"] != f"{config.out_dir}/ckpt.pt"
        print(f"{'branch' if is_branch else 'resume'} from {saved['path']} at step {saved['step']}")
    return lock, common.start_log(config, columns, saved["step"] if saved else 0)


def print_header(config, process, model, n_train):
    """Versions, hardware, commit, size of the model and of the data."""
    try:
        commit = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True,
                                check=False, cwd=Path(__file__).parent).stdout.strip() or "unknown"
    except OSError:  # no git here
        commit = "unknown"
    where = f"{torch.get_num_threads()} threads"
    if process.device.type == "cuda":
        where = torch.cuda.get_device_name()
    print(f"run {config.out_dir} | commit {commit} | python {sys.version.split()[0]} torch "
          f"{torch.__version__} | {process.world_size} x {process.device.type} ({where}) "
          f"{str(process.dtype).removeprefix('torch.')} ({process.why_dtype})")
    print(f"run {common.count_parameters(model.state_dict()) / 1e6:.2f} M parameters | {n_train:,} training "
          f"events | {config.batch_size} events a step, {config.micro_batch_size} at once | "
          f"{config.max_steps * config.batch_size / n_train:.2f} epochs")
    if config.train_split == config.val_split:
        print(f"warning: train_split and val_split are both {config.val_split!r}: val_loss says nothing "
              "about new events")


def print_schedule_notes(config, saved, process, warmup_steps, learning_rate):
    """Say so if the run is too short to reach its learning rate, or if one that has cooled down goes on."""
    if not process.is_main:
        return
    if warmup_steps > config.max_steps:
        print(f"note: the warm-up of {warmup_steps} steps is longer than the run, which never reaches its "
              "learning rate; set warmup_steps, or a smaller beta2")
    elif config.schedule == "trapezoidal" and warmup_steps + config.cooldown_steps > config.max_steps:
        peak = max(learning_rate(step, config) for step in range(config.max_steps))
        print(f"note: warm-up ({warmup_steps} steps) and cooldown ({config.cooldown_steps}) do not fit into "
              f"max_steps = {config.max_steps}: the learning rate reaches {peak:.2g}, not "
              f"{config.learning_rate:.2g}; set "
              f"--cooldown_steps={min(config.max_steps // 2, config.max_steps - warmup_steps)}")
    if saved and saved["path"] == f"{config.out_dir}/ckpt.pt":
        step = saved["step"]
        before, now = learning_rate(step, SimpleNamespace(**saved["config"])), learning_rate(step, config)
        if now > 1.01 * before:
            print(f"note: this run was to end at max_steps = {saved['config']['max_steps']}; now its "
                  f"learning rate rises again at step {step}, from {before:.2g} to {now:.2g}. The clean way "
                  "to several lengths is one long run of train.py with keep_every, and a branch_from for "
                  "each length")


def say_complete(config, saved, process):
    """Of a run whose checkpoint `saved` is already its end."""
    if process.is_main:
        knob = "max_steps (or patience, if that ended it)" if getattr(config, "patience", 0) else "max_steps"
        way = "" if getattr(config, "branch_from", "") else f"raise {knob} to go on, or "
        print(f"{config.out_dir} is complete at step {saved['step']}; {way}choose another out_dir")
