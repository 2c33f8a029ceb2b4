"""Stage 3: from few labels to the neutrino's direction or energy. Train a small head on [CLS], with or without the encoder.

    python finetune.py sample_config/demo_finetune.py                             from out/demo/ckpt.pt
    python finetune.py sample_config/demo_finetune.py sample_config/ablation/scratch.py    the same labels, no pretraining
    python evaluate.py --checkpoint=out/demo_finetune/best.pt --split=test --predictions=out/test.csv      see evaluate.py

Prints one line every log_interval steps and writes log.csv, ckpt.pt (last), best.pt (lowest val_loss after
step 0), config.json, result.txt and evaluation_<val_split>.json (the errors of best.pt, in bins, beside those
of a line fit) into out_dir. Exit status as train.py's. Guessing at random gives a mean angular error of pi/2
= 1.571 rad.
"""
import common  # first: it sets how torch's threads wait

import dataclasses
import os
import time
from contextlib import nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn.parallel import DistributedDataParallel

import data
import evaluate
import knobs
from model import DIRECTION_LOSSES, N_DOMS, POSITION_SCALE, TASKS, ModelConfig, Reconstructor, event_losses, parameter_groups
from train import learning_rate, print_reheating, print_schedule_notes


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
        if self.task == "energy" and getattr(self, "sources", {}).get("direction_loss") == "command line":
            yield "direction_loss has no meaning for task = 'energy'; leave it out"
        if self.freeze_backbone and not self.pretrained:
            yield "freeze_backbone = True needs a pretrained checkpoint: a frozen random encoder learns nothing"


# angles in rad; bias and resolution are mean and spread of log10(energy), predicted over true [dex]
LOG_COLUMNS = ["step", "events", "lr", "loss", "grad_norm", "events_per_s", "val_loss", "val_angle_mean", "val_angle_median",
               "data_ms", "bad_steps",  # time a step waits for its events; steps so far that were skipped
               "val_bias", "val_resolution"]
# Knobs that may differ when a run goes on: the steps already done would have been the same but for rounding,
# and for the learning rate's end, which max_steps and cooldown_steps move
MAY_CHANGE = {"data_dir", "out_dir", "micro_batches", "max_steps", "cooldown_steps", "eval_interval", "log_interval",
              "save_interval", "max_bad_steps", "resume", "device", "dtype", "compile", "wandb_project", "patience"}


# ------------------------------------------------------------------------------------------------------------
# checkpoints
# ------------------------------------------------------------------------------------------------------------

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
        # without positions it does not tell the detector: it is IceCube; its file has scaled positions,
        # rounded to float32
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

    Its ids: 0 is padding, sensor_id + 1 the DOM, and 5161, or later a vector of its own, the mask. Positions
    are scaled as ours are. Its logit for padding is dropped. KeyError if a name is missing or left over.
    Source: its src/polarbert/embedding.py, flash_model.py, base_model.py.
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


# ------------------------------------------------------------------------------------------------------------

def main():
    config = knobs.load_config(FinetuneConfig, __doc__)
    ranks = common.start_device(config)
    autocast = torch.autocast(ranks.device.type, ranks.dtype, enabled=ranks.dtype != torch.float32)
    architecture = [field.name for field in dataclasses.fields(ModelConfig)]
    checkpoint_path, best_path = f"{config.out_dir}/ckpt.pt", f"{config.out_dir}/best.pt"

    # ---- data ----------------------------------------------------------------------------------------------
    geometry = data.read_geometry(config.data_dir)
    val_split, n_val = data.open_first_events(config.data_dir, config.val_split, config.val_events, at_most=True)
    fingerprint = data.fingerprint(config.data_dir)

    def evaluate_best():
        """Evaluate what was kept as best, print and keep the result."""
        result = evaluate.evaluate_checkpoint(evaluate.EvaluateConfig(
            checkpoint=best_path, data_dir=config.data_dir, split=config.val_split, n_events=n_val,
            batch_size=config.batch_size), ranks)
        if ranks.main:
            common.write_atomic(f"{config.out_dir}/result.txt", lambda part: part.write_text(result + "\n"))

    train_split, n_train = data.open_first_events(config.data_dir, config.train_split, config.train_events)
    for split, n in ((train_split, n_train), (val_split, n_val)):
        unlabelled = evaluate.find_unlabelled(split, n, config)
        if len(unlabelled):
            common.fail(f"{split.path}: {len(unlabelled):,} of {n:,} events have no {config.task}, the first is event "
                        f"{split.events['event_id'][unlabelled[0]]}; choose a labelled split (evaluate.py can predict without)")

    def load_step(step):
        """This rank's share of a step; the step's events and shifts do not depend on the number of ranks."""
        index, epoch = data.step_events(step, config.batch_size, n_train, config.seed)
        shift = None
        if config.time_offset_std:  # two uniform numbers make a normal one (Box & Muller)
            u, v = (data.uniform_hash(config.seed, epoch, 2 * index + i) for i in (0, 1))
            shift = (config.time_offset_std * np.sqrt(-2 * np.log1p(-u)) * np.cos(2 * np.pi * v)).astype(np.float32)
            shift = np.array_split(shift, ranks.world_size)[ranks.rank]
        return evaluate.event_batches(train_split, np.array_split(index, ranks.world_size)[ranks.rank], config.micro_batches, shift)

    # ---- model, optimizer, resume, compile, DDP ------------------------------------------------------------
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
                common.fail(f"{best_path} is missing; the last weights can be evaluated with: python evaluate.py "
                            f"--checkpoint={checkpoint_path}")
            evaluate_best()
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
        print_schedule_notes(config)
        common.write_json(f"{config.out_dir}/config.json", dataclasses.asdict(config))
        log = common.start_log(config, LOG_COLUMNS, first_step)
        if saved:
            print_reheating(saved, config)
            print(f"resume from {checkpoint_path} at step {first_step}")

    # ---- training loop -------------------------------------------------------------------------------------
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
            scores = evaluate.score_events(raw_model, val_split, n_val, config, ranks, autocast)
            row |= evaluate.summary(scores, config)
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

        row["lr"] = learning_rate(step, config)
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
    evaluate_best()
    common.stop_device(ranks)


if __name__ == "__main__":
    common.run_stage(main)
