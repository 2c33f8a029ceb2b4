"""Stage 2: pretraining without labels: masked DOMs, and summaries of the event.

    python train.py sample_config/demo.py  # a small model, toy events
    torchrun --nproc_per_node=8 train.py config/base.py    # 8 GPUs
    # cool down from a kept checkpoint
    python train.py config/base.py --init_from=out/base/ckpt_20000.pt \\
        --init_optimizer=True --max_steps=21000 --out_dir=out/base_20k

Prints a line every log_interval steps. Writes log.csv, ckpt.pt (last), best.pt
(lowest val_loss) and config.json into out_dir. dom_loss falls from ln 5160 = 8.55.
The same command resumes a run that was interrupted. Exit status: 0 done,
1 error, 3 diverged, 130 Ctrl-C, 143 SIGTERM (alone).
"""
import utils  # before torch, which reads OMP_WAIT_POLICY when it loads

import math
import os
import signal
import time
from dataclasses import asdict, dataclass, replace
from itertools import chain

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

import data
from model import (CLS_TARGETS, ModelConfig, PolarBERT, angular_error, cls_loss, peak_flops,
                   training_flops, weights_for_detector)
from optim import (Optimizer, Schedule, clip_and_step, get_lr, load_optimizers,
                   make_optimizers)

@dataclass
class TrainConfig(ModelConfig):
    # data
    data_dir: str = "data/icecube"  # folder that prepare.py wrote
    train_split: str = "pretrain"  # needs no labels
    val_split: str = "val"  # to evaluate on
    train_events: int = 0  # use the first N; 0 = all
    val_events: int = 100_000  # use the first N; 0 = all
    mask_prob: float = 0.25  # share of the HLC pulses whose DOM is masked
    mask_unit: str = "pulse"  # masked together: pulse, dom, string; a+b: one of them
    lambda_dom: float = 1.0  # weights of losses: DOM
    lambda_charge: float = 1.0  # squared error of log10(charge)
    lambda_center: float = 1.0  # squared error in 500 m
    lambda_line_fit: float = 1.0  # von Mises-Fisher
    # optimizer
    batch_size: int = 4096  # events a step, over all ranks
    micro_batch_size: int = 0  # events at once; 0 = what suits the device
    max_steps: int = 127_000  # 520 M events: 4 epochs of all 130 M
    learning_rate: float = 1e-3  # at the top of the schedule
    warmup_steps: int = 0  # linear rise; 0 = 1 / (1 - beta2)
    cooldown_steps: int = 1000  # trapezoidal: linear fall to 0
    schedule: Schedule = "trapezoidal"  # after the warm-up
    optimizer: Optimizer = "adamw"  # muon: for the matrices of the blocks
    beta1: float = 0.9  # Adam's memory of the gradient
    beta2: float = 0.9998  # Adam's memory of its square, 5000 steps
    adam_eps: float = 5e-7  # Adam's epsilon
    weight_decay: float = 0.1  # of matrices only
    grad_clip: float = 1.0  # largest norm of the gradient; 0 = no limit
    # run
    out_dir: str = ""  # "" = out/<names of the config files joined by +>
    eval_interval: int = 1000  # steps between evaluations
    log_interval: int = 50  # steps between lines
    save_interval: int = 1000  # steps between checkpoints
    keep_every: int = 0  # steps between checkpoints that stay; 0 = none
    init_from: str = ""  # checkpoint whose weights to begin with
    init_optimizer: bool = False  # begin with its optimizer and step too
    seed: int = 0  # of the weights, the order of events and the masks
    device: utils.Device = "auto"  # auto: a GPU if there is one
    dtype: utils.Dtype = "auto"  # auto: what is fast here
    compile: bool = False  # faster on a GPU
    wandb_project: str = ""  # log to Weights & Biases too

# ---- data, loss, evaluation ---------------------------------------------------------------------

VAL_SEED = 0  # of the masks at evaluation

def masked_batches(split, index, epoch, config, seed):
    """Read the events `index` (B,) of a split -> micro-batches with masked pulses."""
    events, pulses = data.read_events(split, index)
    mask = data.draw_mask(events, pulses, split.geometry["string"], epoch, config.mask_prob,
                          config.mask_unit, seed)
    targets = [CLS_TARGETS[name][0] for name in config.cls_target.split("+")]
    return data.micro_batches(events, pulses, config.micro_batch_size, targets, mask)

def total_loss(losses, config):
    """Return the sum of the losses, each times its lambda_<name>."""
    return sum(getattr(config, f"lambda_{name}") * loss for name, loss in losses.items())

@torch.no_grad()
def evaluate(model, split, config, autocast) -> dict:
    """Return mean losses and metrics over a split, by fixed masks.

    val_string_dom_loss masks strings, all else single pulses. val_loss has the
    former if the run masks strings.
    """
    geometry = model.encoder.embedding.geometry
    mine = data.shard(len(split.events))
    chunks = np.array_split(mine, -(-len(split.events) // config.batch_size))
    chunks = [chunk for chunk in chunks if len(chunk)]
    if not chunks:
        utils.fail(f"{split.path}: fewer events than ranks")
    dom_loss = {}
    for unit in ("string", "pulse"):  # the other numbers are those of "pulse"
        masks, rows = replace(config, mask_prob=0.25, mask_unit=unit), []
        for batch in chain.from_iterable(data.prefetch(
                lambda index: masked_batches(split, index, 0 * index, masks, VAL_SEED),
                chunks, geometry.device)):
            with autocast:
                logits, cls_pred = model.predict(batch)
            dom, guess = batch["dom"][batch["masked"]], logits.argmax(-1)  # (M,)
            sums = {
                "dom_loss": model.dom_loss(logits, batch).sum(),
                "n_events": batch["n_masked_events"],
                "ce": F.cross_entropy(logits, dom, reduction="sum"),
                "top1": (guess == dom).sum(),
                "distance": (geometry[guess] - geometry[dom]).norm(dim=-1).sum(),  # [m]
                "n_pulses": len(dom),
            }
            for name, pred in cls_pred.items():
                loss, known = cls_loss(name, pred, batch)
                sums |= {f"{name}_loss": loss.sum(), f"known_{name}": known.sum()}
                if name == "line_fit":
                    angle = angular_error(F.normalize(pred, dim=-1), batch["line_fit"])  # [rad]
                    sums["line_fit_angle"] = (angle * known).sum()
            sums = {name: torch.as_tensor(x, device=dom.device).float()
                    for name, x in sums.items()}
            rows.append(torch.stack(list(sums.values())))
        totals = utils.all_reduce_sum(torch.stack(rows).cpu().double().sum(0))
        # what was not measured is 0 / 0 = NaN
        totals = dict(zip(sums, torch.tensor(totals, dtype=torch.float64)))
        dom_loss[unit] = totals["dom_loss"] / totals["n_events"]
    unit = "string" if "string" in config.mask_unit else "pulse"
    losses = {"dom": dom_loss[unit]}
    for name in cls_pred:
        losses[name] = totals[f"{name}_loss"] / totals[f"known_{name}"]
    val = {"loss": total_loss(losses, config)}
    losses |= {"dom": dom_loss["pulse"], "string_dom": dom_loss["string"]}
    val |= {f"{name}_loss": loss for name, loss in losses.items()}
    for name in ("ce", "top1", "distance"):
        val[name] = totals[name] / totals["n_pulses"]
    if "line_fit" in cls_pred:
        val["line_fit_angle"] = totals["line_fit_angle"] / totals["known_line_fit"]
    return {f"val_{name}": value.item() for name, value in val.items()}

# ---- training -----------------------------------------------------------------------------------

def main():
    config = utils.load_config(TrainConfig, __doc__)
    device, dtype, autocast = utils.init_distributed(config)
    lock = utils.lock_folder(config.out_dir)  # held until the end

    # data
    meta, geometry = data.read_folder(config.data_dir)
    train_data = data.open_split(config.data_dir, config.train_split, config.train_events)
    val_data = data.open_split(config.data_dir, config.val_split, config.val_events)
    n_train = len(train_data.events)
    if config.train_split == config.val_split:
        utils.fail(f"train_split and val_split are both {config.val_split!r}; "
                   f"event {val_data.events['event_id'][0]} would be in both")
    if not set(config.mask_unit.split("+")) <= {"pulse", "dom", "string"}:
        utils.fail(f"mask_unit = {config.mask_unit!r}: join some of pulse, dom, string by +")
    data_id = {
        "fingerprint": meta["fingerprint"],
        "n_train": n_train,
        "splits": [config.train_split, config.val_split],
        "rule": meta["rule"],
    }

    def load_step(step):
        """Load this rank's share of a step."""
        index, epoch = data.step_events(step, config.batch_size, n_train, config.seed)
        mine = data.shard(config.batch_size)
        return masked_batches(train_data, index[mine], epoch[mine], config, config.seed)

    # checkpoint: of this run, or of another one to begin with
    resume = os.path.exists(f"{config.out_dir}/ckpt.pt")
    path = f"{config.out_dir}/ckpt.pt" if resume else config.init_from
    checkpoint = utils.load_checkpoint(path) if path else None
    if config.init_optimizer and not checkpoint:
        utils.fail("init_optimizer = True needs init_from")
    if checkpoint:
        utils.match_options(config, checkpoint, ModelConfig, data_id, path, resume)
    if config.micro_batch_size == 0:
        config.micro_batch_size = data.fitting_micro_batch_size(config, device, meta)

    # model, optimizers
    torch.manual_seed(config.seed)
    raw_model = PolarBERT(config, geometry).to(device)
    optimizers = make_optimizers(raw_model, config)
    is_float16 = dtype == torch.float16
    scaler = torch.amp.GradScaler(device.type, init_scale=1024, enabled=is_float16)
    start_step, best_val_loss = 0, math.inf
    n_bad_steps = torch.zeros((), device=device)
    if checkpoint:
        weights = weights_for_detector(checkpoint["model"], geometry, path)
        raw_model.load_state_dict(weights)
    if resume or config.init_optimizer:
        load_optimizers(optimizers, scaler, checkpoint)
        start_step = checkpoint["step"]
    if resume:
        best_val_loss = checkpoint["best_val_loss"]
        n_bad_steps += checkpoint["bad_steps"]
    state = [start_step, data_id["fingerprint"]]
    if utils.all_reduce_sum(state) != [utils.WORLD_SIZE * x for x in state]:
        utils.fail("the ranks find other checkpoints or data; they must share a disk")
    if start_step > config.max_steps:
        utils.fail(f"{path} has made {start_step} steps, more than max_steps")
    if resume and start_step == config.max_steps:
        utils.print0(f"{config.out_dir} is complete; use another out_dir, or raise max_steps")
        return 0
    model = torch.compile(raw_model, dynamic=True) if config.compile else raw_model
    if utils.WORLD_SIZE > 1:
        torch._dynamo.config.optimize_ddp = False  # or each new length compiles again
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
            guess = f"guessing a DOM: {math.log(len(geometry)):.4g}" * (config.dom_loss == "ce")
            utils.print0(f"eval {step}/{config.max_steps} | {text} | {guess}")
            if not math.isfinite(row["val_loss"]):
                if step == start_step:  # no step can have caused it
                    utils.fail(f"val_loss is not finite before the first step: look for NaN in "
                               f"{val_data.path}_*.bin {path and f'or {path}'}")
                utils.fail(f"step {step}: val_loss is not finite; ckpt.pt is from before; "
                           "try a smaller learning_rate", status=3)
            if row["val_loss"] < best_val_loss:
                best_val_loss = row["val_loss"]
                save("best.pt", step)
        if config.keep_every and step % config.keep_every == 0:
            save(f"ckpt_{step}.pt", step)
        if last_step:
            log({"step": step, "events": step * config.batch_size, **row})
        if last_step or step % config.save_interval == 0 or stop_requested:
            save("ckpt.pt", step)
        if last_step or stop_requested:
            break
        start_time += time.perf_counter() - pause_time  # this was not training

        # this step's events, over all ranks; how many of them have a masked pulse
        # DIFF(upstream): means over each GPU's batch
        batches = next(loader)
        n_masked_events = sum(batch["n_masked_events"] for batch in batches)
        n_masked_events, stop_requested = utils.all_reduce_sum(
            [n_masked_events, len(caught_signals)])

        # micro-batches: normalise by global counts, so that micro-batching does not change
        # the update; an event without a line fit counts as loss 0 (evaluate leaves it out)
        counts = {"dom": max(n_masked_events, 1)}
        step_losses = 0
        for i, batch in enumerate(batches):
            # DDP adds gradients once
            model.require_backward_grad_sync = i == len(batches) - 1
            with autocast:
                losses = model(batch)
            shares = {name: loss.sum() / counts.get(name, config.batch_size)
                      for name, loss in losses.items()}
            loss = total_loss(shares, config)
            scaler.scale(loss * utils.WORLD_SIZE).backward()  # DDP averages over ranks
            step_losses = step_losses + torch.stack(list(shares.values())).detach()

        # clip, update
        lr = get_lr(step, config)
        grad_norm = clip_and_step(raw_model, optimizers, scaler, lr, config.grad_clip)
        n_bad_steps += ~grad_norm.isfinite()

        # log; only here the loop waits for the GPU
        n_timed += 1
        if step % config.log_interval == 0:
            means = dict(zip(shares, utils.all_reduce_sum(step_losses)))
            row |= {"lr": lr, "loss": total_loss(means, config)}
            row |= {f"{name}_loss": mean for name, mean in means.items()}
            row |= {"grad_norm": grad_norm.item(), "bad_steps": int(n_bad_steps.item())}
            seconds = (time.perf_counter() - start_time) / n_timed
            row["events_per_s"] = config.batch_size / seconds
            row["eta_s"] = (config.max_steps - step) * seconds
            if device.type == "cuda" and (peak := peak_flops(device)):
                row["mfu"] = training_flops(raw_model, batches) / seconds / peak
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
    utils.print0(f"done: best val_loss {best_val_loss:.4f} in {config.out_dir}/best.pt")

if __name__ == "__main__":
    utils.run_main(main)
