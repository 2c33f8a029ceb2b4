"""Stage 3: fine-tuning. A head on [CLS] learns direction, energy or class from labels.

    python finetune.py sample_config/demo_finetune.py    # after the demo
    python finetune.py sample_config/demo_finetune.py sample_config/ablation/frozen.py
    python finetune.py sample_config/demo_finetune.py sample_config/ablation/scratch.py

The encoder learns too, unless it is frozen. Prints a line every log_interval steps.
Writes log.csv, ckpt.pt (last), best.pt (lowest val_loss) and config.json into
out_dir. At the end evaluate.py scores best.pt. Resuming and exit status are as in
train.py. A random direction has a mean error of pi/2 = 1.571 rad.
"""
import utils  # before torch

import math
import os
import signal
import time
import zlib
from dataclasses import asdict, dataclass
from typing import Literal

import numpy as np
import torch
from torch.nn.parallel import DistributedDataParallel

import data
from evaluate import (EvaluateConfig, evaluate_checkpoint, has_labels, predict, statistics,
                      task_scores)
from model import TASKS, ModelConfig, Reconstructor, weights_for_detector
from optim import (Optimizer, Schedule, clip_and_step, get_lr, load_optimizers,
                   make_optimizers)

@dataclass
class FinetuneConfig(ModelConfig):
    # data
    data_dir: str = "data/icecube"  # folder that prepare.py wrote
    train_split: str = "finetune"  # needs labels
    val_split: str = "val"  # to evaluate on
    train_events: int = 0  # use the first N, so that sets are nested; 0 = all
    train_start: int = 0  # skip this many before
    val_events: int = 0  # use the first N; 0 = all
    time_offset_std: float = 0.0  # [ns] shift each event in time at random
    # task
    pretrained: str = "out/base/ckpt.pt"  # checkpoint; "" = from scratch
    task: Literal["direction", "energy", "class"] = "direction"  # class: track or cascade
    direction_loss: str = "angular"  # or cosine, vmf; joined by +
    freeze_backbone: bool = False  # train the head alone
    line_fit_head: bool = True  # begin the head with the learned line fit
    head_hidden_size: int = 1024  # Linear(D, this), ReLU, Linear(this, n)
    # optimizer
    batch_size: int = 1024  # events a step, over all ranks
    micro_batch_size: int = 0  # events at once; 0 = what suits the device
    max_steps: int = 19_531  # 20 epochs of 1 M labels
    learning_rate: float = 1.5e-5  # at the top of the schedule
    warmup_steps: int = 1000  # linear rise; 0 = 1 / (1 - beta2)
    cooldown_steps: int = 1000  # trapezoidal: linear fall to 0
    schedule: Schedule = "cosine"  # after the warm-up
    optimizer: Optimizer = "adamw"  # muon: for the matrices of the blocks
    beta1: float = 0.92  # Adam's memory of the gradient
    beta2: float = 0.9998  # Adam's memory of its square
    adam_eps: float = 3e-7  # Adam's epsilon
    weight_decay: float = 0.0  # of matrices only
    grad_clip: float = 1.0  # largest norm of the gradient; 0 = no limit
    # run
    out_dir: str = ""  # "" = out/<names of the config files joined by +>
    eval_interval: int = 1000  # steps between evaluations
    log_interval: int = 50  # steps between lines
    save_interval: int = 1000  # steps between checkpoints
    seed: int = 0  # of the weights and the order of events
    device: utils.Device = "auto"  # auto: a GPU if there is one
    dtype: utils.Dtype = "auto"  # auto: what is fast here
    compile: bool = False  # faster on a GPU
    wandb_project: str = ""  # log to Weights & Biases too

# ---- what the loop needs ------------------------------------------------------------------------

def open_labelled(config, name, n_events, start=0):
    """Open n_events of a split, all of which must have the labels of the task."""
    split = data.open_split(config.data_dir, name, n_events and start + n_events)
    split = split._replace(events=split.events[start:])
    if not len(split.events):
        utils.fail(f"{split.path}: no event after train_start = {start}")
    missing = ~has_labels(split.events, config.task)
    if missing.any():
        utils.fail(f"{split.path}: {missing.sum():,} of {len(missing):,} events have no "
                   f"{config.task}, first event_id {split.events['event_id'][missing][0]}")
    return split

def shift_times(events, pulses, index, epoch, config):
    """Return the pulses, each event shifted by a normal number [ns]."""
    u, v = (data.uniform_hash(config.seed, epoch, 2 * index + i) for i in (0, 1))
    normal = np.sqrt(-2 * np.log1p(-u)) * np.cos(2 * np.pi * v)  # Box & Muller
    pulses = pulses.copy()
    pulses["time"] += np.repeat(config.time_offset_std * normal, events["length"])
    return pulses

def evaluate(model, split, config, autocast) -> dict:
    """Return the mean loss and the statistics over a split."""
    parts = [{"loss": arrays["loss"], **task_scores(arrays["x"], events, config.task)}
             for events, arrays in predict(model, split, config, autocast)]
    scores = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    results, _ = statistics(scores, config.task)
    prefix = "val_angle_" if config.task == "direction" else "val_"
    val = {"val_loss": scores["loss"].mean(), **{prefix + k: x for k, x in results.items()}}
    return {name: float(x) for name, x in val.items()}

def head_of_line_fit(head, weights):
    """Copy pretraining's line fit into six hidden units of the head -> its weights.

    The others stay random. x = relu(x) - relu(-x).
    """
    w, b = (weights[f"cls_heads.line_fit.{x}"] for x in ("weight", "bias"))
    head, one = head.state_dict(), torch.eye(3)
    head["0.weight"][:6] = torch.cat([w, -w])
    head["0.bias"][:6] = torch.cat([b, -b])
    head["2.weight"][:, :6] = torch.cat([one, -one], dim=1)
    return head

# ---- training -----------------------------------------------------------------------------------

def main():
    config = utils.load_config(FinetuneConfig, __doc__)
    device, dtype, autocast = utils.init_distributed(config)
    lock = utils.lock_folder(config.out_dir)  # held until the end
    if not set(config.direction_loss.split("+")) <= {"angular", "cosine", "vmf"}:
        utils.fail(f"direction_loss = {config.direction_loss!r}: angular, cosine or vmf")
    if config.freeze_backbone and not config.pretrained:
        utils.fail("freeze_backbone = True needs a pretrained checkpoint")

    # data
    meta, geometry = data.read_folder(config.data_dir)
    train_data = open_labelled(config, config.train_split, config.train_events,
                               config.train_start)
    val_data = open_labelled(config, config.val_split, config.val_events)
    n_train = len(train_data.events)
    if config.train_split == config.val_split:
        utils.fail(f"train_split and val_split are both {config.val_split!r}; "
                   f"event {val_data.events['event_id'][0]} would be in both")
    data_id = {
        "fingerprint": meta["fingerprint"],
        "n_train": n_train,
        "splits": [config.train_split, config.val_split],
        "start": config.train_start,
        "rule": meta["rule"],
    }

    def load_step(step):
        """Load this rank's share of a step."""
        index, epoch = data.step_events(step, config.batch_size, n_train, config.seed)
        mine = data.shard(config.batch_size)
        events, pulses = data.read_events(train_data, index[mine])
        if config.time_offset_std:
            pulses = shift_times(events, pulses, index[mine], epoch[mine], config)
        labels = TASKS[config.task][0]
        return data.micro_batches(events, pulses, config.micro_batch_size, labels)

    best = EvaluateConfig(f"{config.out_dir}/best.pt", config.data_dir, config.val_split,
                          n_events=config.val_events, batch_size=config.batch_size)

    # checkpoint: of this run, or of a pretrained model
    resume = os.path.exists(f"{config.out_dir}/ckpt.pt")
    path = f"{config.out_dir}/ckpt.pt" if resume else config.pretrained
    checkpoint = utils.load_checkpoint(path) if path else None
    data_id["pretrained"] = resume and checkpoint["data"].get("pretrained")
    if os.path.isfile(config.pretrained):
        data_id["pretrained"] = zlib.crc32(open(config.pretrained, "rb").read())
    if checkpoint:
        utils.match_options(config, checkpoint, ModelConfig, data_id, path, resume)
    if config.micro_batch_size == 0:
        config.micro_batch_size = data.fitting_micro_batch_size(config, device, meta)

    # model, optimizer
    torch.manual_seed(config.seed)
    raw_model = Reconstructor(config, geometry).to(device)
    start_step, best_val_loss = 0, math.inf
    n_bad_steps = torch.zeros((), device=device)
    if checkpoint:
        weights = checkpoint["model"]
        if not resume:  # the encoder of the checkpoint, a new head
            steps = checkpoint["config"]["max_steps"]
            if checkpoint.get("step", steps) < steps:
                utils.print0(f"warning: {path}: of step {checkpoint['step']} of {steps}")
            head = raw_model.head.state_dict()
            has_fit = "cls_heads.line_fit.weight" in weights and config.head_hidden_size > 5
            if config.line_fit_head and has_fit and config.task == "direction":
                head = head_of_line_fit(raw_model.head, weights)
            weights = {name: x for name, x in weights.items() if name.startswith("encoder.")}
            weights |= {f"head.{name}": x for name, x in head.items()}
        # DIFF(upstream): strict=False, what is missing stays random without a message
        raw_model.load_state_dict(weights_for_detector(weights, geometry, path))
    raw_model.encoder.requires_grad_(not config.freeze_backbone)
    optimizers = make_optimizers(raw_model, config)
    scaler = torch.amp.GradScaler(device.type, init_scale=1024, enabled=dtype == torch.float16)
    if resume:
        load_optimizers(optimizers, scaler, checkpoint)
        start_step, best_val_loss = checkpoint["step"], checkpoint["best_val_loss"]
        n_bad_steps += checkpoint["bad_steps"]
    state = [start_step, data_id["fingerprint"]]
    if utils.all_reduce_sum(state) != [utils.WORLD_SIZE * x for x in state]:
        utils.fail("the ranks find other checkpoints or data; they must share a disk")
    if start_step > config.max_steps:
        utils.fail(f"{path} has made {start_step} steps, more than max_steps")
    if resume and start_step == config.max_steps:
        utils.print0(f"{config.out_dir} is complete; use another out_dir, or raise max_steps")
        evaluate_checkpoint(best, device, autocast)
        return 0
    model = torch.compile(raw_model, dynamic=True) if config.compile else raw_model
    if utils.WORLD_SIZE > 1:
        torch._dynamo.config.optimize_ddp = False
        model = DistributedDataParallel(model, broadcast_buffers=False)

    def save(name, step):
        content = {
            "format": utils.CHECKPOINT_FORMAT,
            "model": raw_model.state_dict(),
            "optimizer": [optimizer.state_dict() for optimizer in optimizers],
            "scaler": scaler.state_dict(),
            "step": step,
            "best_val_loss": best_val_loss,
            "bad_steps": n_bad_steps.item(),
            "data": data_id,
            "config": asdict(config),
        }
        path = f"{config.out_dir}/{name}"
        utils.write_atomic(path, lambda part: torch.save(content, part))

    n_parameters = sum(parameter.numel() for parameter in raw_model.parameters())
    utils.print0(f"{config.out_dir}: {n_parameters / 1e6:.2f} M parameters, {n_train:,} events, "
                 f"{utils.WORLD_SIZE} x {device.type}, {dtype}")
    log = utils.start_log(config, start_step)

    # training loop
    loader = data.prefetch(load_step, range(start_step, config.max_steps), device)
    caught_signals, stop_requested = [], False
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda caught, frame: caught_signals.append(caught))
    start_time, n_timed = time.perf_counter(), 0
    for step in range(start_step, config.max_steps + 1):
        last_step = step == config.max_steps
        row = {}

        # evaluate, save
        pause_time = time.perf_counter()
        if last_step or (step % config.eval_interval == 0 and not stop_requested):
            row |= evaluate(raw_model, val_data, config, autocast)
            text = " ".join(f"{name} {x:.4g}" for name, x in row.items())
            utils.print0(f"eval {step}/{config.max_steps} | {text}")
            if not math.isfinite(row["val_loss"]):
                if step == start_step:  # no step can have caused it
                    utils.fail(f"val_loss is not finite before the first step: look for NaN in "
                               f"{val_data.path}_*.bin {path and f'or {path}'}")
                utils.fail(f"step {step}: val_loss is not finite; ckpt.pt is from before; "
                           "try a smaller learning_rate", status=3)
            if row["val_loss"] < best_val_loss:
                best_val_loss = row["val_loss"]
                save("best.pt", step)
        if last_step:
            log({"step": step, "events": step * config.batch_size, **row})
        if last_step or step % config.save_interval == 0 or stop_requested:
            save("ckpt.pt", step)
        if last_step or stop_requested:
            break
        start_time += time.perf_counter() - pause_time  # this was not training

        # this step's events
        batches = next(loader)
        stop_requested = utils.all_reduce_sum([len(caught_signals)])[0]

        # micro-batches: normalise by the whole step, so that they do not change the update
        step_loss = 0.0
        for i, batch in enumerate(batches):
            model.require_backward_grad_sync = i == len(batches) - 1
            with autocast:
                x = model(batch)
            loss = raw_model.loss(x, batch).sum() / config.batch_size
            scaler.scale(loss * utils.WORLD_SIZE).backward()
            step_loss += loss.detach()

        # clip, update
        lr = get_lr(step, config)
        grad_norm = clip_and_step(raw_model, optimizers, scaler, lr, config.grad_clip)
        n_bad_steps += ~grad_norm.isfinite()

        # log; only here the loop waits for the GPU
        n_timed += 1
        if step % config.log_interval == 0:
            loss = utils.all_reduce_sum(step_loss[None])[0]
            row |= {"lr": lr, "loss": loss, "grad_norm": grad_norm.item()}
            row["bad_steps"] = int(n_bad_steps.item())
            seconds = (time.perf_counter() - start_time) / n_timed
            row["events_per_s"] = config.batch_size / seconds
            row["eta_s"] = (config.max_steps - step) * seconds
            start_time, n_timed = time.perf_counter(), 0
            text = " ".join(f"{name} {x:.4g}" for name, x in row.items() if name[:4] != "val_")
            utils.print0(f"step {step}/{config.max_steps} | {text}")
            if not math.isfinite(row["loss"]):
                utils.fail(f"step {step}: the loss is not finite; ckpt.pt is from before; "
                           "try a smaller learning_rate", status=3)
        if row:
            log({"step": step, "events": step * config.batch_size, **row})

    if not last_step:
        utils.print0(f"stopped at step {step}; the same command resumes")
        return 128 + caught_signals[0] if utils.WORLD_SIZE == 1 else 0
    signal.signal(signal.SIGINT, signal.default_int_handler)
    utils.all_reduce_sum([0])  # rank 0 may still write best.pt
    evaluate_checkpoint(best, device, autocast)

if __name__ == "__main__":
    utils.run_main(main)
