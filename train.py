"""Stage 2: pretraining without labels. Hide DOM ids and predict them; predict the event's charge from [CLS].

    python train.py sample_config/demo.py                                  a small model on simulated events
    torchrun --nproc_per_node=8 train.py config/base.py                    the paper's run on 8 GPUs
    python train.py config/base.py --mask_prob=0.5 --out_dir=out/mask50    an ablation
    python train.py config/base.py --branch_from=out/base/ckpt_20000.pt --out_dir=out/base20k     cool down

Prints one line every log_interval steps and writes log.csv, ckpt.pt (last), best.pt (lowest val_loss) and
config.json into out_dir. Expect dom_loss to fall from ln 5160 = 8.55. Ctrl-C or SIGTERM: it finishes the step
and saves; the same command goes on from there. Exit status: 0 done, or stopped by SIGTERM; 1 an error of the
user; 3 diverged; 130 Ctrl-C.
"""
import common  # first: it sets how torch's threads wait

import dataclasses
import math
import os
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import torch

import data
import knobs
from model import CLS_TARGETS, ModelConfig, Pretrainer, parameter_groups


@dataclass
class TrainConfig(ModelConfig):
    data_dir: str = "data/icecube"  # folder made by prepare.py
    train_split: str = "pretrain"  # split to learn from; needs no labels
    val_split: str = "val"  # split to evaluate on
    train_events: int = 0  # use the first N events of train_split; 0 = all
    val_events: int = 100_000  # evaluate on the first N events of val_split, or as many as there are; 0 = all
    out_dir: str = ""  # where the run is kept; "" = out/<stems of the config files joined by +>
    batch_size: int = 4096  # events a step, over all ranks
    micro_batch_size: int = 0  # events computed at once, which changes no result; 0 = what suits the device
    max_steps: int = 127_000  # updates; of 4096 events: 520 M, 4 epochs of all 130 M, 5.2 of batches 1-500
    learning_rate: float = 1e-3  # at the top of the schedule
    warmup_steps: int = 0  # linear rise from 0; 0 = 1 / (1 - beta2)
    cooldown_steps: int = 1000  # trapezoidal only: linear fall to 0 at the end
    schedule: str = "trapezoidal"  # or "cosine", "constant"
    optimizer: str = "adamw"  # or "muon" (Jordan et al. 2024) for the matrices of the backbone
    beta1: float = 0.9  # Adam's memory of the gradient
    beta2: float = 0.9998  # Adam's memory of its square, 5000 steps
    adam_eps: float = 5e-7  # Adam's floor under the root of the squared gradient
    weight_decay: float = 0.1  # of the matrices only, see model.parameter_groups
    grad_clip: float = 1.0  # largest norm of the gradient
    mask_prob: float = 0.25  # share of good pulses (aux = False) whose DOM id is hidden
    lambda_charge: float = 1.0  # weight of the charge's loss, beside the DOM loss with weight 1
    lambda_center: float = 1.0  # weight of the centre's loss
    lambda_motion: float = 1.0  # weight of the motion's loss
    eval_interval: int = 1000  # steps between evaluations
    log_interval: int = 50  # steps between log lines
    save_interval: int = 1000  # steps between checkpoints
    keep_every: int = 0  # steps between checkpoints that stay, ckpt_<step>.pt, to branch from; 0 = none
    pretrained: str = ""  # checkpoint whose weights to begin with, also of another detector; "" = random
    branch_from: str = ""  # checkpoint of another run, from its schedule's flat part: only cool down
    max_bad_steps: int = 20  # a run ends after more gradients in a row than this that are not finite
    resume: bool = True  # go on from out_dir/ckpt.pt if there is one; False refuses a folder that holds a run
    seed: int = 0  # of the weights, the order of events and the masks
    device: str = "auto"  # or "cuda", "mps", "cpu"
    dtype: str = "auto"  # "bfloat16", "float16", "float32"; auto = bfloat16 where the hardware has it
    compile: bool = False  # torch.compile, 1 minute at the start; gains nothing on a CPU
    wandb_project: str = ""  # also log to this project of Weights & Biases; "" = off

    def check(self):
        yield from super().check()
        yield from knobs.check_training(self)
        yield from knobs.check_fraction(self, "mask_prob")
        yield from knobs.check_not_negative(self, "keep_every", *(f"lambda_{name}" for name in CLS_TARGETS))
        yield from knobs.check_choice(self, "optimizer", ("adamw", "muon"))
        if self.optimizer == "muon" and (self.mup_base_width or self.mup_base_layers):
            yield ("mup_base_width and mup_base_layers carry learning rates of AdamW, not of optimizer = "
                   "'muon'; put sample_config/ablation/adamw.py after the other config files")
        if self.branch_from and self.pretrained:
            yield "branch_from and pretrained are two different beginnings; leave one out"
        if self.branch_from and (self.schedule != "trapezoidal" or self.cooldown_steps == 0):
            yield "branch_from is a cooldown: it needs schedule = 'trapezoidal' and cooldown_steps > 0"


# perplexity, top1, top5 (right DOM among the best 1, 5), string (right string) and distance of the best guess
# [m] are means over hidden pulses; what [CLS] does not predict stays empty
LOG_COLUMNS = ["step", "events", "lr", "loss", "dom_loss", *(f"{name}_loss" for name in CLS_TARGETS),
               "grad_norm", "events_per_s", "val_loss", "val_dom_loss",
               *(f"val_{name}_loss" for name in CLS_TARGETS), "val_perplexity", "val_top1", "val_top5",
               "val_string", "val_distance", *(f"val_{target.metric}" for target in CLS_TARGETS.values()),
               "data_ms", "bad_steps"]  # time a step waits for its events; steps so far that were skipped
VAL_SEED = 0  # of the masks at evaluation: the same for every run, so that runs with other seeds compare
# Knobs that may differ when a run goes on: the steps already done would have been the same but for rounding,
# and for the learning rate's end, which max_steps and cooldown_steps move
MAY_CHANGE = {"data_dir", "out_dir", "micro_batch_size", "max_steps", "cooldown_steps", "eval_interval",
              "log_interval", "save_interval", "keep_every", "max_bad_steps", "resume", "device", "dtype",
              "compile", "wandb_project"}


# ------------------------------------------------------------------------------------------------------------
# masking
# ------------------------------------------------------------------------------------------------------------

def hide_pulses(events, pulses, epoch, mask_prob, seed):
    """Which pulses are hidden, bool (P,): each good one (aux = False) with mask_prob, at least one of them.

    events (B,), their pulses (P,) one after another, epoch (B,). The draw is a hash of seed, epoch and the
    pulse's place on disk.
    # DIFF(upstream): an event may have nothing hidden there, and validation masks are new every time
    """
    length = events["length"].astype(np.int64)
    draw = data.uniform_hash(seed, np.repeat(epoch, length), data.pulse_places(events))
    draw[pulses["aux"]] = 2.0  # never
    smallest = np.minimum.reduceat(draw, np.cumsum(length) - length)
    limit = np.where(smallest < 1.0, np.maximum(np.nextafter(smallest, 1.0), mask_prob), mask_prob)
    return draw < np.repeat(limit, length)


def masked_batches(split, index, epoch, config, seed):
    """The events `index` of a split as micro-batches with hidden pulses."""
    events, pulses = data.read_events(split, index)
    hidden = hide_pulses(events, pulses, epoch, config.mask_prob, seed)
    labels = [CLS_TARGETS[name].label for name in config.cls_target.split("+")]
    return data.micro_batches(events, pulses, config.micro_batch_size, labels, hidden)


# ------------------------------------------------------------------------------------------------------------
# evaluation
# ------------------------------------------------------------------------------------------------------------

def loss_weights(config):
    """Weights of the losses that Pretrainer.forward gives: 1 for the DOM loss, lambda_<name> for others."""
    return {"dom": 1.0} | {name: getattr(config, f"lambda_{name}") for name in config.cls_target.split("+")}


@torch.no_grad()
def evaluate(model, split, n_events, config, process):
    """Losses and metrics over exactly the first n_events, with the same masks each time -> dict of val_*."""
    mine = common.share_of_rank(n_events, process)
    n_chunks = -(-len(mine) * process.world_size // config.batch_size)  # at most as many events as in a step
    chunks = np.array_split(mine, n_chunks) if n_chunks else []  # a rank may have none

    def load(i):
        return masked_batches(split, chunks[i], np.zeros_like(chunks[i]), config, VAL_SEED)

    totals = np.zeros(len(model.metric_names) + 2)
    model.eval()
    for batches in data.prefetch(load, range(len(chunks)), process.device):
        for batch in batches:
            with process.autocast:
                sums = model.metrics(batch)
            totals += [*sums.tolist(), batch["n_scored"], batch["n_hidden"]]
    model.train()
    *sums, n_scored, n_hidden = common.sum_over_ranks(totals, process)
    sums, n_hidden = dict(zip(model.metric_names, sums)), max(n_hidden, 1)
    n_averaged = max(n_scored, 1) if config.loss_weighting == "per_event" else n_hidden
    losses = {"dom": sums["dom_loss"] / n_averaged}
    losses |= {name: sums[f"{name}_loss"] / max(sums[f"{name}_known"], 1) for name in model.targets}
    row = {"val_loss": sum(weight * losses[name] for name, weight in loss_weights(config).items())}
    row |= {f"val_{name}_loss": loss for name, loss in losses.items()}
    row |= {f"val_{name}": sums[name] / n_hidden for name in ("top1", "top5", "string", "distance")}
    row["val_perplexity"] = math.exp(min(sums["cross_entropy"] / n_hidden, 700))
    for name, target in model.targets.items():
        row[f"val_{target.metric}"] = target.of_mean(sums[f"{name}_metric"] / max(sums[f"{name}_known"], 1))
    return row


# ------------------------------------------------------------------------------------------------------------
# learning rate
# ------------------------------------------------------------------------------------------------------------

def warmup_steps(config):
    """The knob; its 0 means the memory of Adam's second moment, 1 / (1 - beta2): 5000 steps for 0.9998."""
    return config.warmup_steps or round(1 / (1 - config.beta2))


def learning_rate(step, config):
    """Of update `step` (from 0): linear warm-up, then the schedule; it falls to 0 at max_steps."""
    warmup = warmup_steps(config)
    rise = min(1.0, (step + 1) / warmup)
    if config.schedule == "trapezoidal":
        return config.learning_rate * min(rise, (config.max_steps - step) / max(config.cooldown_steps, 1))
    if config.schedule == "cosine" and step >= warmup:
        done = (step - warmup) / (config.max_steps - warmup)
        return config.learning_rate * 0.5 * (1 + math.cos(math.pi * done))
    return config.learning_rate * rise  # "constant"


def print_schedule_notes(config):
    """Say so if the run is too short for its schedule: it never reaches its learning rate."""
    warmup = warmup_steps(config)
    if warmup > config.max_steps:
        print(f"note: the warm-up of {warmup} steps is longer than the run, which never reaches its learning "
              "rate; set warmup_steps, or a smaller beta2")
    elif config.schedule == "trapezoidal" and warmup + config.cooldown_steps > config.max_steps:
        peak = max(learning_rate(step, config) for step in range(config.max_steps))
        print(f"note: warm-up ({warmup} steps) and cooldown ({config.cooldown_steps}) do not fit into "
              f"max_steps = {config.max_steps}: the learning rate reaches {peak:.2g}, not "
              f"{config.learning_rate:.2g}; set "
              f"--cooldown_steps={min(config.max_steps // 2, config.max_steps - warmup)}")


def print_reheating(saved, config):
    """Say so if a run that has cooled down goes on: its learning rate rises again."""
    step = saved["step"]
    before, now = learning_rate(step, SimpleNamespace(**saved["config"])), learning_rate(step, config)
    if now > 1.01 * before:
        print(f"note: this run was to end at max_steps = {saved['config']['max_steps']}; now its learning "
              f"rate rises again at step {step}, from {before:.2g} to {now:.2g}. The clean way to several "
              "lengths is one long run of train.py with keep_every, and a branch_from for each length")


# ------------------------------------------------------------------------------------------------------------
# optimizer
# ------------------------------------------------------------------------------------------------------------

def make_optimizers(model, config):
    """AdamW, or Muon for the matrices of the backbone and AdamW for the rest."""
    groups, optimizers = parameter_groups(model, config.weight_decay), []
    if config.optimizer == "muon":  # its updates are as large as AdamW's: one learning rate serves both
        matrices = [parameter for parameter in groups[0]["params"] if parameter.ndim == 2]
        groups[0]["params"] = [parameter for parameter in groups[0]["params"] if parameter.ndim != 2]
        optimizers = [Muon(matrices, weight_decay=config.weight_decay)]
    return [make_adamw(groups, config), *optimizers]


def make_adamw(groups, config):
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=(config.beta1, config.beta2),
                             eps=config.adam_eps, fused=True)


class Muon(torch.optim.Muon):
    """torch's, but in float32 on a CPU, where that is faster; and whether a step is bad is not waited for."""

    @torch.no_grad()
    def step(self):
        good = 1.0 - self.found_inf  # of the device: 1, or 0 to change nothing
        for group in self.param_groups:
            for matrix in group["params"]:
                gradient = torch.where(good > 0, matrix.grad, 0.0)
                momentum = self.state[matrix].setdefault("momentum_buffer", torch.zeros_like(matrix))
                momentum.lerp_(gradient, good * (1 - group["momentum"]))
                update = orthogonal(gradient.lerp(momentum, group["momentum"])).to(matrix.dtype)
                matrix.mul_(1 - good * group["lr"] * group["weight_decay"])
                # as large as an update of AdamW (Liu et al. 2025, arXiv:2502.16982)
                matrix.sub_(update * (good * group["lr"] * 0.2 * max(matrix.shape) ** 0.5))


def orthogonal(matrix):
    """About U V^T of U S V^T: five Newton-Schulz steps with Muon's coefficients (Jordan et al. 2024)."""
    x = matrix.bfloat16() if matrix.is_cuda else matrix.float()
    x = x.T if len(x) > x.shape[1] else x
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(5):
        square = x @ x.T
        x = 3.4445 * x + (-4.775 * square + 2.0315 * square @ square) @ x
    return x.T if len(matrix) > matrix.shape[1] else x


# ------------------------------------------------------------------------------------------------------------
# branches
# ------------------------------------------------------------------------------------------------------------

def find_branch(config, saved):
    """Where a run with branch_from begins -> its own checkpoint, or that of the long run; and its max_steps.

    One long run with a constant learning rate gives a whole curve over training time, if a cooldown branches
    off at several steps (Hägele et al. 2024, arXiv:2405.18392).
    """
    path = config.branch_from
    if saved:  # the branch goes on
        before = saved["config"]["cooldown_steps"]
        common.check_same(f"{config.out_dir}/ckpt.pt", "cooldown_steps", before, config.cooldown_steps)
        return saved, saved["config"]["max_steps"]
    origin = common.load_checkpoint(path)
    if "task" in origin["config"]:
        common.fail(f"{path} is a fine-tuned checkpoint; a branch begins from one of train.py")
    for field in dataclasses.fields(config):
        if field.name not in MAY_CHANGE | {"branch_from"}:
            before = origin["config"].get(field.name, common.default_of(field))
            now = getattr(config, field.name)
            if before != now:
                common.fail(f"{path} was written with {field.name} = {before!r}, now it is {now!r}; a branch "
                            "repeats the knobs of its run")
    first, last = warmup_steps(config), origin["config"]["max_steps"] - origin["config"]["cooldown_steps"]
    if first > last:
        common.fail(f"{path}: its run has no flat part to branch from: a warm-up of {first} steps, and a "
                    f"cooldown from step {last} on; branch from a longer run, or one with a shorter warm-up")
    if not first <= origin["step"] <= last:
        common.fail(f"{path} is at step {origin['step']}, outside the flat part of its schedule, steps "
                    f"{first} to {last}; set keep_every in the long run and branch from one of those "
                    "checkpoints")
    return origin | {"best_val": float("inf")}, origin["step"] + config.cooldown_steps


# ------------------------------------------------------------------------------------------------------------

def main():
    config = knobs.load_config(TrainConfig, __doc__)
    process = common.start_process(config)
    checkpoint_path = f"{config.out_dir}/ckpt.pt"
    if config.pretrained:  # tells the architecture; if the run goes on, its own checkpoint does
        begin = checkpoint_path if os.path.exists(checkpoint_path) else config.pretrained
        pretrained = common.load_checkpoint(begin)
        if "task" in pretrained["config"]:
            common.fail(f"{begin} is a fine-tuned checkpoint; begin with one of train.py")
        knobs.take_architecture(config, ModelConfig, pretrained, begin)
    saved = common.find_run(config, checkpoint_path, MAY_CHANGE)
    begins_from = checkpoint_path if saved else config.branch_from
    if config.branch_from:
        saved, config.max_steps = find_branch(config, saved)
    if saved and saved["step"] >= config.max_steps:
        if process.is_main:
            print(f"{config.out_dir} is complete at step {saved['step']}; raise max_steps to go on, or "
                  "choose another out_dir")
        common.stop_process(process)
        return

    # ---- data ----------------------------------------------------------------------------------------------
    train_split, n_train = data.open_first_events(config.data_dir, config.train_split, config.train_events)
    val_split, n_val = data.open_first_events(config.data_dir, config.val_split, config.val_events,
                                              at_most=True)
    geometry, fingerprint = data.read_geometry(config.data_dir), data.fingerprint(config.data_dir)
    config.micro_batch_size = config.micro_batch_size or common.suited_micro_batch_size(
        process, data.read_meta(config.data_dir)["max_pulses"], config)

    def load_step(step):
        """This rank's share of a step; the step's events and masks do not depend on the number of ranks."""
        index, epoch = data.step_events(step, config.batch_size, n_train, config.seed)
        mine = common.share_of_rank(config.batch_size, process)
        return masked_batches(train_split, index[mine], epoch[mine], config, config.seed)

    # ---- model, optimizer, checkpoint ----------------------------------------------------------------------
    torch.manual_seed(config.seed)
    raw_model = Pretrainer(config, geometry).to(process.device)
    if config.pretrained and not saved:
        weights = common.weights_for(pretrained, geometry, config.pretrained, config.data_dir)
        raw_model.load_state_dict(weights)
    optimizer = common.GuardedOptimizer(raw_model, make_optimizers(raw_model, config), config, process)
    first_step, best_val = 0, float("inf")
    if saved:
        common.check_same(begins_from, "events in train_split", saved["n_train"], n_train)
        common.check_geometry(saved, geometry, begins_from, config.data_dir)
        common.check_events(saved, fingerprint, begins_from, config.data_dir)
        raw_model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved)
        first_step, best_val = saved["step"], saved["best_val"]
    model = common.compiled_and_distributed(raw_model, config, process)

    def save(path, step):
        if process.is_main:
            common.save_checkpoint(path, model=raw_model.state_dict(), **optimizer.state_dict(), step=step,
                                   best_val=best_val, n_train=n_train, data=fingerprint,
                                   config=dataclasses.asdict(config))

    if process.is_main:
        lock = common.hold_lock(config.out_dir)  # held until main() ends
        knobs.print_knobs(config)
        common.print_run_header(config, process, raw_model, n_train)
        print_schedule_notes(config)
        common.write_json(f"{config.out_dir}/config.json", dataclasses.asdict(config))
        if saved and begins_from == checkpoint_path:
            print_reheating(saved, config)
        if saved:
            print(f"{'branch' if begins_from == config.branch_from else 'resume'} from {begins_from} at step "
                  f"{first_step}")
    log = common.start_log(config, LOG_COLUMNS, first_step)

    # ---- training loop -------------------------------------------------------------------------------------
    weights = loss_weights(config)
    loader = data.prefetch(load_step, range(first_step, config.max_steps), process.device)
    bar = common.progress_bar(config.max_steps, "pretrain", "step", initial=first_step)
    speed, caught, asked_to_stop = common.Speedometer(config.batch_size), common.catch_signals(), False
    for step in range(first_step, config.max_steps + 1):  # one extra turn to evaluate and save
        is_end = step == config.max_steps
        row = {"step": step, "events": step * config.batch_size}

        # asked to stop
        if asked_to_stop and not is_end:
            save(checkpoint_path, step)
            bar.close()
            common.end_stopped_run(config, caught, step, process)

        with speed.pause():
            # evaluate
            if step % config.eval_interval == 0 or is_end:
                row |= evaluate(raw_model, val_split, n_val, config, process)
                bar.write(f"eval {step:6d}/{config.max_steps} | " + common.describe(row))
                common.check_val_loss(config, step, row["val_loss"])
                if row["val_loss"] < best_val and step > 0:
                    best_val = row["val_loss"]
                    save(f"{config.out_dir}/best.pt", step)

            # save; at step 0 too, so that a run that has a log has a checkpoint
            if step % config.save_interval == 0 or is_end:
                save(checkpoint_path, step)
            if config.keep_every and step % config.keep_every == 0 and step > 0:
                save(f"{config.out_dir}/ckpt_{step}.pt", step)
        if is_end:
            log(row)
            break

        # learning rate
        row["lr"] = learning_rate(step, config)
        optimizer.set_learning_rate(row["lr"])

        # events; what the DOM loss is the mean over, on all ranks; whether any rank was asked to stop
        batches = speed.next_step(loader)
        count = "n_scored" if config.loss_weighting == "per_event" else "n_hidden"
        n_averaged, asked_to_stop = common.sum_over_ranks(
            [sum(batch[count] for batch in batches), bool(caught)], process)

        # micro-batches: each adds its share of the step's means, so the cuts do not change the update
        step_losses = dict.fromkeys(weights, 0.0)
        for i, batch in enumerate(batches):
            with common.summing_gradients(model, process, is_last=i == len(batches) - 1):
                with process.autocast:
                    losses = model(batch)
                means = {name: loss.sum() / (max(n_averaged, 1) if name == "dom" else config.batch_size)
                         for name, loss in losses.items()}
                loss = sum(weight * means[name] for name, weight in weights.items())
                optimizer.backward(loss * process.world_size)  # DDP takes the mean over ranks
            step_losses = {name: step_losses[name] + mean.detach() for name, mean in means.items()}

        # guarded step
        grad_norm = optimizer.step()

        # log; only here the loop waits for the GPU
        if step % config.log_interval == 0:
            sums = common.sum_over_ranks(torch.stack(list(step_losses.values())), process)
            sums = dict(zip(weights, sums))
            row |= {"loss": sum(weight * sums[name] for name, weight in weights.items()),
                    **{f"{name}_loss": value for name, value in sums.items()},
                    "grad_norm": grad_norm.item(), "bad_steps": optimizer.n_bad.item()}
            columns, speed_text = speed.read()
            row |= columns
            bar.write(f"step {step:6d}/{config.max_steps} | loss {row['loss']:.4f} "
                      + " ".join(f"{name} {value:.4f}" for name, value in sums.items())
                      + f" | norm {row['grad_norm']:.2f} | lr {row['lr']:.1e} | {speed_text}"
                      + (f" | {row['bad_steps']} steps skipped" if row["bad_steps"] else ""))
            if optimizer.gave_up():
                with torch.no_grad(), process.autocast:
                    losses = [sum(raw_model(batch).values()) for batch in batches]
                common.stop_bad_run(config, step, losses, batches, process)
        if step % config.log_interval == 0 or "val_loss" in row:
            log(row)
        bar.update()

    bar.close()
    common.release_signals()
    if process.is_main:
        print(f"done: {checkpoint_path}, best val_loss {best_val:.4f} in {config.out_dir}/best.pt, curves in "
              "log.csv")
    common.stop_process(process)


if __name__ == "__main__":
    common.run_stage(main)
