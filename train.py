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
from dataclasses import dataclass

import numpy as np
import torch

import data
import knobs
import runs
from model import ModelConfig, Pretrainer, parameter_groups
from optimizers import GuardedOptimizer, Muon
from tasks import CLS_TARGETS


@dataclass
class TrainConfig(runs.RunConfig, ModelConfig):
    """What is learned, and how. Beside it: the architecture; runs.RunConfig, where and how often to save."""
    data_dir: str = "data/icecube"  # folder made by prepare.py
    train_split: str = "pretrain"  # split to learn from; needs no labels
    val_split: str = "val"  # split to evaluate on
    train_events: int = 0  # use the first N events of train_split; 0 = all
    val_events: int = 100_000  # evaluate on the first N events of val_split, or as many as there are; 0 = all
    batch_size: int = 4096  # events a step, over all ranks
    max_steps: int = 127_000  # updates; of 4096 events: 520 M, 4 epochs of all 130 M, 5.2 of batches 1-500
    learning_rate: float = 1e-3  # at the top of the schedule
    warmup_steps: int = 0  # linear rise from 0; 0 = 1 / (1 - beta2)
    cooldown_steps: int = 1000  # trapezoidal only: linear fall to 0 at the end
    schedule: str = "trapezoidal"  # or "cosine", "constant"
    optimizer: str = "adamw"  # or "muon" (Jordan et al. 2024) for the matrices of the backbone
    beta1: float = 0.9  # Adam's memory of the gradient
    beta2: float = 0.9998  # Adam's memory of the squared gradient: some 1 / (1 - beta2) = 5000 steps
    adam_eps: float = 5e-7  # Adam's epsilon, added to the root of the mean squared gradient
    weight_decay: float = 0.1  # of the matrices only, see model.parameter_groups
    grad_clip: float = 1.0  # largest norm of the gradient
    mask_prob: float = 0.25  # share of good pulses (aux = False) whose DOM id is hidden
    lambda_charge: float = 1.0  # weight of the charge's loss, beside the DOM loss with weight 1
    lambda_center: float = 1.0  # weight of the centre's loss
    lambda_motion: float = 1.0  # weight of the motion's loss
    keep_every: int = 0  # steps between checkpoints that stay, ckpt_<step>.pt, to branch from; 0 = none
    pretrained: str = ""  # checkpoint whose weights to begin with, also of another detector; "" = random
    branch_from: str = ""  # checkpoint of another run, from its schedule's flat part: only cool down
    seed: int = 0  # of the weights, the order of events and the masks

    def check(self):
        yield from ModelConfig.check(self)
        yield from runs.RunConfig.check(self)
        yield from knobs.check_fraction(self, "mask_prob")
        missing = [name for name in CLS_TARGETS if not hasattr(self, f"lambda_{name}")]
        if missing:
            yield f"tasks.CLS_TARGETS has {missing[0]!r}; its weight is missing here, lambda_{missing[0]}"
            return
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

# ------------------------------------------------------------------------------------------------------------
# masking
# ------------------------------------------------------------------------------------------------------------

def draw_hidden(events, pulses, epoch, mask_prob, seed):
    """Draw which pulses to hide -> bool (P,): each good one (aux = False) with probability mask_prob.

    If none is drawn, it is the one with the smallest number; an event without good pulses hides none. events
    (B,), their pulses (P,) one after another, epoch (B,). The draw is a hash of seed, epoch and the pulse's
    place on disk.
    # DIFF(upstream): an event may have nothing hidden there, and validation masks are new every time
    """
    length = events["length"].astype(np.int64)
    draw = data.uniform_hash(seed, np.repeat(epoch, length), data.pulse_places(events))
    draw[pulses["aux"]] = 2.0  # never
    # an event's limit lies just above its smallest number, if mask_prob does not: one pulse is always hidden
    smallest = np.minimum.reduceat(draw, np.cumsum(length) - length)
    limit = np.where(smallest < 1.0, np.maximum(np.nextafter(smallest, 1.0), mask_prob), mask_prob)
    return draw < np.repeat(limit, length)


def masked_batches(split, index, epoch, config, seed):
    """The events `index` of a split as micro-batches with hidden pulses."""
    events, pulses = data.read_events(split, index)
    hidden = draw_hidden(events, pulses, epoch, config.mask_prob, seed)
    labels = [CLS_TARGETS[name].label for name in config.cls_target.split("+")]
    return data.micro_batches(events, pulses, config.micro_batch_size, labels, hidden)


# ------------------------------------------------------------------------------------------------------------
# loss, evaluation
# ------------------------------------------------------------------------------------------------------------

def total_loss(losses, config):
    """The DOM loss plus lambda_<name> times each other. losses: dict as Pretrainer.forward gives it."""
    weights = {name: 1.0 if name == "dom" else getattr(config, f"lambda_{name}") for name in losses}
    return sum(weight * losses[name] for name, weight in weights.items())


@torch.no_grad()
def evaluate(model, split, n_events, config, process):
    """Losses and metrics over exactly the first n_events, with the same masks each time -> dict of val_*."""
    mine = common.share_of_rank(n_events, process)
    n_chunks = -(-len(mine) * process.world_size // config.batch_size)  # at most as many events as in a step
    chunks = np.array_split(mine, n_chunks) if n_chunks else []  # a rank may have none

    def load(i):
        return masked_batches(split, chunks[i], np.zeros_like(chunks[i]), config, VAL_SEED)

    totals = np.zeros(len(model.metric_names) + 2)  # and n_scored, n_hidden
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
    row = {"val_loss": total_loss(losses, config)}
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
    """Of update `step` (from 0): linear warm-up, then the schedule, which ends at 0 but for "constant"."""
    warmup = warmup_steps(config)
    rise = min(1.0, (step + 1) / warmup)
    if config.schedule == "trapezoidal":
        return config.learning_rate * min(rise, (config.max_steps - step) / max(config.cooldown_steps, 1))
    if config.schedule == "cosine" and step >= warmup:
        done = (step - warmup) / max(config.max_steps - warmup, 1)
        return config.learning_rate * 0.5 * (1 + math.cos(math.pi * done))
    return config.learning_rate * rise  # "constant"


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


# ------------------------------------------------------------------------------------------------------------

def main():
    config = knobs.load_config(TrainConfig, __doc__)
    process = common.start_process(config)
    checkpoint_path = f"{config.out_dir}/ckpt.pt"
    pretrained = runs.load_pretrained(config)  # it tells the architecture
    saved = runs.find_run(config)
    if config.branch_from:
        saved = runs.find_branch(config, saved, warmup_steps(config))
    runs.check_ranks(config, saved, process)
    if saved and saved["step"] >= config.max_steps:
        runs.say_complete(config, saved, process)
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
    if pretrained and not saved:
        weights = common.weights_for(pretrained, geometry, config.pretrained, config.data_dir)
        raw_model.load_state_dict(weights)
    optimizer = GuardedOptimizer(raw_model, make_optimizers(raw_model, config), config, process)
    first_step, best_val = 0, float("inf")
    if saved:
        runs.check_data(saved, config, n_train, geometry, fingerprint)
        raw_model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved)
        first_step, best_val = saved["step"], saved["best_val"]
    model = common.compiled_and_distributed(raw_model, config, process)

    def save(path, step):
        if process.is_main:
            common.save_checkpoint(path, model=raw_model.state_dict(), **optimizer.state_dict(), step=step,
                                   best_val=best_val, n_train=n_train, data=fingerprint,
                                   config=dataclasses.asdict(config))

    # while lock exists, no other run writes into out_dir; log(row) adds to log.csv
    lock, log = runs.start_run(config, process, raw_model, n_train, saved, LOG_COLUMNS)
    runs.print_schedule_notes(config, saved, process, warmup_steps(config), learning_rate)

    # ---- training loop -------------------------------------------------------------------------------------
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
                bar.write(common.evaluation_line(row, config))
                common.check_val_loss(config, step, row["val_loss"])
                if row["val_loss"] < best_val and step > 0:
                    best_val = row["val_loss"]
                    save(f"{config.out_dir}/best.pt", step)

            # save; at the first step too, so that a run that has a log has a checkpoint
            if step % config.save_interval == 0 or step == first_step or is_end:
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
        # DIFF(upstream): means over each GPU's batch there
        batches = speed.next_step(loader)
        count = "n_scored" if config.loss_weighting == "per_event" else "n_hidden"
        n_averaged, asked_to_stop = common.sum_over_ranks(
            [sum(batch[count] for batch in batches), bool(caught)], process)

        # micro-batches: each adds its share of the step's means, so the cuts do not change the update; in a
        # [CLS] loss an event whose truth is not known counts as 0, while evaluate() leaves it out
        step_losses = {}
        for i, batch in enumerate(batches):
            with common.summing_gradients(model, process, is_last=i == len(batches) - 1):
                with process.autocast:
                    losses = model(batch)
                means = {name: loss.sum() / (max(n_averaged, 1) if name == "dom" else config.batch_size)
                         for name, loss in losses.items()}
                loss = total_loss(means, config)
                optimizer.backward(loss * process.world_size)  # DDP takes the mean over ranks
            step_losses = {name: step_losses.get(name, 0.0) + mean.detach() for name, mean in means.items()}

        # clip the gradient, update the weights; a gradient that is not finite changes nothing
        grad_norm = optimizer.step()

        # log; only here the loop waits for the GPU
        if step % config.log_interval == 0:
            sums = common.sum_over_ranks(torch.stack(list(step_losses.values())), process)
            losses = dict(zip(step_losses, sums))
            row |= {"loss": total_loss(losses, config)}
            row |= {f"{name}_loss": value for name, value in losses.items()}
            row |= {"grad_norm": grad_norm.item(), "bad_steps": optimizer.n_bad.item()} | speed.read()
            bar.write(common.step_line(row, config))
            if optimizer.gave_up():
                with torch.no_grad(), process.autocast:
                    of_events = [sum(raw_model(batch).values()) for batch in batches]  # for the message
                common.stop_bad_run(config, step, of_events, batches, process)
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
