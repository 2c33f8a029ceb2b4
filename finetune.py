"""Stage 3: fine-tuning. A small head on [CLS] learns the neutrino's direction, energy or class from labels.

    python finetune.py sample_config/demo_finetune.py                       the encoder of out/demo/ckpt.pt
    python finetune.py sample_config/demo_finetune.py sample_config/ablation/frozen.py      the head alone
    python finetune.py sample_config/demo_finetune.py sample_config/ablation/scratch.py     no pretraining

The encoder learns with it, unless it is frozen. Prints one line every log_interval steps and writes log.csv,
ckpt.pt (last), best.pt (lowest val_loss after step 0) and config.json into out_dir. At the end evaluate.py
scores best.pt: result.txt and evaluation_<val_split>.json. Stopping, going on and exit status are as in
train.py. A random direction is off by pi/2 = 1.571 rad on the mean.
"""
import common  # first: it sets how torch's threads wait

import dataclasses
import os
from dataclasses import dataclass

import numpy as np
import torch

import data
import evaluate
import knobs
import runs
from model import ModelConfig, Reconstructor, parameter_groups
from optimizers import GuardedOptimizer
from tasks import DIRECTION_LOSSES, TASKS
from train import learning_rate, make_adamw, warmup_steps


@dataclass
class FinetuneConfig(runs.RunConfig, ModelConfig):
    """What is learned, and how. Beside it, as in train.py: the architecture, and runs.RunConfig."""
    data_dir: str = "data/icecube"  # folder made by prepare.py
    train_split: str = "finetune"  # split with labels to learn from
    val_split: str = "val"  # split to evaluate on
    train_events: int = 0  # use the first N events of train_split, so that sets are nested; 0 = all
    val_events: int = 0  # evaluate on the first N events of val_split, or as many as there are; 0 = all
    pretrained: str = "out/base/ckpt.pt"  # checkpoint whose encoder to begin with; "" = from scratch
    task: str = "direction"  # or "energy", log10 of the neutrino's in GeV; or "class", track or cascade
    direction_loss: str = "angular"  # mean angle; or "cosine", "vmf" (with uncertainty), "angular+vmf"
    freeze_backbone: bool = False  # train the head alone; the whole encoder, its embedding too, stays
    head_hidden_size: int = 1024  # of the head: Linear(D, this), ReLU, Linear(this, what the task needs)
    head_lr_factor: float = 1.0  # learning rate of the head over that of the encoder
    time_offset_std: float = 0.0  # [ns] shift each event in time at random: only differences count
    batch_size: int = 1024  # events a step, over all ranks
    max_steps: int = 19_531  # updates; 19,531 x 1024 events = 20 epochs of 1 M labels
    patience: int = 0  # end after so many evaluations without a lower val_loss; 0 = never
    learning_rate: float = 1.5e-5  # at the top of the schedule; the encoder is good already
    warmup_steps: int = 1000  # linear rise from 0; 0 = 1 / (1 - beta2)
    cooldown_steps: int = 1000  # trapezoidal only: linear fall to 0 at the end
    schedule: str = "cosine"  # or "trapezoidal", "constant"
    beta1: float = 0.92  # Adam's memory of the gradient
    beta2: float = 0.9998  # Adam's memory of the squared gradient
    adam_eps: float = 3e-7  # Adam's epsilon, added to the root of the mean squared gradient
    weight_decay: float = 0.0  # of the matrices only
    grad_clip: float = 1.0  # largest norm of the gradient
    seed: int = 0  # of the weights and the order of events

    def check(self):
        yield from ModelConfig.check(self)
        yield from runs.RunConfig.check(self)
        yield from knobs.check_positive(self, "head_hidden_size", "head_lr_factor")
        yield from knobs.check_not_negative(self, "time_offset_std", "patience")
        yield from knobs.check_choice(self, "task", TASKS)
        yield from knobs.check_joined(self, "direction_loss", DIRECTION_LOSSES)
        if self.task != "direction" and getattr(self, "sources", {}).get("direction_loss") == "command line":
            yield f"direction_loss has no meaning for task = {self.task!r}; leave it out"
        if self.freeze_backbone and not self.pretrained:
            yield ("freeze_backbone = True needs a pretrained checkpoint: a frozen random encoder learns "
                   "nothing")


# the columns of other tasks stay empty; angles in rad, bias and resolution in dex
LOG_COLUMNS = ["step", "events", "lr", "loss", "grad_norm", "events_per_s", "val_loss",
               *(column for task in TASKS.values() for column in task.log),
               "data_ms", "bad_steps"]  # time a step waits for its events; steps so far that were skipped


# ------------------------------------------------------------------------------------------------------------
# from a pretrained model to one for a task
# ------------------------------------------------------------------------------------------------------------

def load_encoder(model, weights, path):
    """Copy the encoder of a pretrained (or fine-tuned) checkpoint. All of it must be there; the head is new.

    # DIFF(upstream): strict=False there, whatever is missing stays random without a word
    """
    missing, unexpected = model.load_state_dict(weights, strict=False)
    new_head = [name for name in model.state_dict() if not name.startswith("encoder.")]
    if missing != new_head or unexpected:
        common.fail(f"{path}: its encoder is not complete: missing {sorted(set(missing) - set(new_head))}, "
                    f"not known {unexpected}")


def finetune_groups(model, config):
    """Optimizer groups with the head in its own: its learning rate is head_lr_factor times as large."""
    head = {id(parameter) for parameter in model.head.parameters()}
    groups = []
    for group in parameter_groups(model, config.weight_decay):
        for is_head, factor in ((False, 1.0), (True, config.head_lr_factor)):
            params = [parameter for parameter in group["params"] if (id(parameter) in head) == is_head]
            groups.append({**group, "params": params, "lr_scale": group["lr_scale"] * factor})
    return [group for group in groups if group["params"]]


# ------------------------------------------------------------------------------------------------------------
# what the loop needs
# ------------------------------------------------------------------------------------------------------------

def shift_at_random(events, pulses, index, epoch, config):
    """A copy of the pulses, each event shifted in time by a normal number of its own, new in each epoch."""
    u, v = (data.uniform_hash(config.seed, epoch, 2 * index + i) for i in (0, 1))
    normal = np.sqrt(-2 * np.log1p(-u)) * np.cos(2 * np.pi * v)  # Box & Muller: of two uniform ones
    pulses = pulses.copy()
    pulses["time"] += np.repeat((config.time_offset_std * normal).astype(np.float32), events["length"])
    return pulses


def is_out_of_patience(step, best_step, config):
    return config.patience > 0 and step - best_step >= config.patience * config.eval_interval


def is_complete(saved, config):
    """Whether a run has reached its end; one that was stopped has yet to make the evaluation of that step."""
    return saved["step"] >= config.max_steps or saved.get("ended", False) and is_out_of_patience(
        saved["step"], saved["best_step"], config)


# ------------------------------------------------------------------------------------------------------------

def main():
    config = knobs.load_config(FinetuneConfig, __doc__)
    task = TASKS[config.task]
    process = common.start_process(config)
    checkpoint_path, best_path = f"{config.out_dir}/ckpt.pt", f"{config.out_dir}/best.pt"
    pretrained = runs.load_pretrained(config)  # it tells the architecture
    saved = runs.find_run(config)
    runs.check_ranks(config, saved, process)

    # ---- data ----------------------------------------------------------------------------------------------
    geometry, fingerprint = data.read_geometry(config.data_dir), data.fingerprint(config.data_dir)
    train_split, n_train = data.open_first_events(config.data_dir, config.train_split, config.train_events)
    val_split, n_val = data.open_first_events(config.data_dir, config.val_split, config.val_events,
                                              at_most=True)
    evaluate.check_labels(train_split, n_train, config)
    evaluate.check_labels(val_split, n_val, config)
    config.micro_batch_size = config.micro_batch_size or common.suited_micro_batch_size(
        process, data.read_meta(config.data_dir)["max_pulses"], config)

    def load_step(step):
        """This rank's share of a step; the step's events do not depend on the number of ranks."""
        index, epoch = data.step_events(step, config.batch_size, n_train, config.seed)
        mine = common.share_of_rank(config.batch_size, process)
        events, pulses = data.read_events(train_split, index[mine])
        if config.time_offset_std:
            pulses = shift_at_random(events, pulses, index[mine], epoch[mine], config)
        return data.micro_batches(events, pulses, config.micro_batch_size, task.labels)

    def evaluate_best():
        """Evaluate what was kept as best, print and keep the result."""
        result = evaluate.evaluate_checkpoint(evaluate.EvaluateConfig(
            checkpoint=best_path, data_dir=config.data_dir, split=config.val_split, n_events=n_val,
            batch_size=config.batch_size, micro_batch_size=config.micro_batch_size), process)
        if process.is_main:
            common.write_atomic(f"{config.out_dir}/result.txt", lambda part: part.write_text(result + "\n"))

    if saved:
        runs.check_data(saved, config, n_train, geometry, fingerprint)
        if is_complete(saved, config):
            runs.say_complete(config, saved, process)
            if not os.path.exists(best_path):
                common.fail(f"{best_path} is missing; the last weights can be evaluated with: python "
                            f"evaluate.py --checkpoint={checkpoint_path}")
            evaluate_best()
            common.stop_process(process)
            return

    # ---- model, optimizer, checkpoint ----------------------------------------------------------------------
    torch.manual_seed(config.seed)
    raw_model = Reconstructor(config, geometry)
    if pretrained and not saved:
        encoder = common.weights_for(pretrained, geometry, config.pretrained, config.data_dir, "encoder.")
        load_encoder(raw_model, encoder, config.pretrained)
        if "task" in pretrained["config"] and process.is_main:
            print(f"note: {config.pretrained} is fine-tuned; its encoder goes on, its head does not")
    raw_model.encoder.requires_grad_(not config.freeze_backbone)
    raw_model.to(process.device)
    adamw = make_adamw(finetune_groups(raw_model, config), config)
    optimizer = GuardedOptimizer(raw_model, [adamw], config, process)
    first_step, best_val, best_step = 0, float("inf"), 0
    if saved:
        raw_model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved)
        first_step, best_val, best_step = saved["step"], saved["best_val"], saved["best_step"]
    model = common.compiled_and_distributed(raw_model, config, process)

    def save(path, step):
        if process.is_main:
            common.save_checkpoint(path, model=raw_model.state_dict(), **optimizer.state_dict(), step=step,
                                   best_val=best_val, best_step=best_step, ended=is_end, n_train=n_train,
                                   data=fingerprint, config=dataclasses.asdict(config))

    lock, log = runs.start_run(config, process, raw_model, n_train, saved, LOG_COLUMNS)
    runs.print_schedule_notes(config, saved, process, warmup_steps(config), learning_rate)

    # ---- training loop -------------------------------------------------------------------------------------
    loader = data.prefetch(load_step, range(first_step, config.max_steps), process.device)
    bar = common.progress_bar(config.max_steps, "finetune", "step", initial=first_step)
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
                row |= evaluate.summary(evaluate.score_events(raw_model, val_split, n_val, config, process),
                                        config)
                bar.write(common.evaluation_line(row, config))
                common.check_val_loss(config, step, row["val_loss"])
                if row["val_loss"] < best_val and step > 0:
                    best_val, best_step = row["val_loss"], step
                    save(best_path, step)
                if is_out_of_patience(step, best_step, config) and not is_end:
                    is_end = True
                    bar.write(f"no lower val_loss than at step {best_step} in patience = {config.patience} "
                              "evaluations: this is the end")

            # save; at step 0 too, so that a run that has a log has a checkpoint
            if step % config.save_interval == 0 or is_end:
                save(checkpoint_path, step)
        if is_end:
            log(row)
            break

        # learning rate
        row["lr"] = learning_rate(step, config)
        optimizer.set_learning_rate(row["lr"])

        # events; whether any rank was asked to stop: then all do, after this step
        batches = speed.next_step(loader)
        asked_to_stop, = common.sum_over_ranks([bool(caught)], process)

        # micro-batches: each adds its share of the step's mean, so the cuts do not change the update
        step_loss = 0.0
        for i, batch in enumerate(batches):
            with common.summing_gradients(model, process, is_last=i == len(batches) - 1):
                with process.autocast:
                    outputs = model(batch)
                loss = task.loss(outputs, batch, config).sum() / config.batch_size
                optimizer.backward(loss * process.world_size)  # DDP takes the mean over ranks
            step_loss += loss.detach()

        # clip the gradient, update the weights; a gradient that is not finite changes nothing
        grad_norm = optimizer.step()

        # log; only here the loop waits for the GPU
        if step % config.log_interval == 0:
            row["loss"], = common.sum_over_ranks(step_loss[None], process)
            row |= {"grad_norm": grad_norm.item(), "bad_steps": optimizer.n_bad.item()} | speed.read()
            bar.write(common.step_line(row, config))
            if optimizer.gave_up():
                with torch.no_grad(), process.autocast:
                    losses = [task.loss(raw_model(batch), batch, config) for batch in batches]
                common.stop_bad_run(config, step, losses, batches, process)
        if step % config.log_interval == 0 or "val_loss" in row:
            log(row)
        bar.update()

    bar.close()
    common.release_signals()
    common.wait_for_all(process)  # rank 0 may still be writing best.pt
    evaluate_best()
    common.stop_process(process)


if __name__ == "__main__":
    common.run_stage(main)
