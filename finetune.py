"""Stage 3: from few labels to the neutrino's direction. Train a small head on [CLS], with or without the encoder.

    python finetune.py sample_config/demo_finetune.py                             from out/demo/ckpt.pt
    python finetune.py sample_config/demo_finetune.py sample_config/scratch.py    the same labels, no pretraining
    python finetune.py sample_config/demo_finetune.py --eval_only=True --val_split=test --val_events=0 \\
        --predictions=out/test.csv

Prints one line every log_interval steps and writes log.csv, ckpt.pt (last), best.pt (lowest val_loss), config.json and
result.txt (the error of best.pt) into out_dir. Guessing at random gives a mean angular error of pi/2 = 1.571 rad.
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
import pyarrow.parquet
import torch
from torch.nn.parallel import DistributedDataParallel

import data
from model import N_DOMS, POSITION_SCALE, DirectionFinder, ModelConfig, angular_error, parameter_groups, unit_vector


@dataclass
class FinetuneConfig(ModelConfig):
    data_dir: str = "data/icecube"  # folder made by prepare.py
    train_split: str = "finetune"  # split with labels to learn from
    val_split: str = "val"  # split to evaluate on, or to predict
    train_events: int = 0  # use the first N events of train_split, so that sets are nested; 0 = all
    val_events: int = 0  # use the first N events of val_split; 0 = all
    out_dir: str = ""  # where the run is kept; "" = out/<stems of the config files joined by +>
    pretrained: str = "out/base/ckpt.pt"  # checkpoint whose encoder to begin with, ours or a published one; "" = from scratch
    task: str = "direction"  # what to reconstruct
    direction_loss: str = "angular"  # mean angle between predicted and true direction
    freeze_backbone: bool = False  # train the head alone
    head_hidden_size: int = 1024  # of the head Linear(D, 1024), ReLU, Linear(1024, 3)
    batch_size: int = 1024  # events a step, over all ranks
    micro_batches: int = 4  # pieces a rank's share is cut into, sorted by length; more pieces need less memory
    max_steps: int = 19_531  # updates; 19,531 x 1024 events = 20 epochs of 1 M labels
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
    predictions: str = ""  # .csv or .parquet to write for val_split: event_id, azimuth, zenith [rad]; "" = none
    resume: bool = True  # go on from out_dir/ckpt.pt if there is one; False refuses a folder that holds a run
    seed: int = 0  # of the weights and the order of events
    device: str = "auto"  # or "cuda", "mps", "cpu"
    dtype: str = "auto"  # autocast to "bfloat16", "float16" or not ("float32"); auto = bfloat16 where it is fast
    compile: bool = False  # torch.compile, 1 minute at the start; gains nothing on a CPU
    wandb_project: str = ""  # also log to this project of Weights & Biases; "" = off

    def check(self):
        yield from super().check()
        yield from common.check_training(self)
        yield from common.check_positive(self, "head_hidden_size")
        yield from common.check_choice(self, "task", TASKS)
        yield from common.check_choice(self, "direction_loss", DIRECTION_LOSSES)
        if self.predictions and Path(self.predictions).suffix not in (".csv", ".parquet"):
            yield f"predictions = {self.predictions!r}: the name must end in .csv or .parquet"
        above = nearest_parent(self.predictions)
        if self.predictions and not (above.is_dir() and os.access(above, os.W_OK)):
            yield f"predictions = {self.predictions!r}: {above} is not a folder to write in"
        if self.checkpoint and not self.eval_only:
            yield f"checkpoint = {self.checkpoint!r} is what --eval_only=True evaluates; to begin from it, use --pretrained="
        if self.freeze_backbone and not self.pretrained:
            yield "freeze_backbone = True needs a pretrained checkpoint: a frozen random encoder learns nothing"


TASKS = {"direction": DirectionFinder}
DIRECTION_LOSSES = {"angular": angular_error}  # (direction, truth), unit vectors (B, 3) each -> (B,)
LOG_COLUMNS = ["step", "events", "lr", "loss", "grad_norm", "events_per_s", "val_loss", "val_angle_mean", "val_angle_median",
               "data_ms", "bad_steps"]  # time a step waits for its events; steps so far that were skipped
# Knobs that may differ when a run goes on: the steps already done would have been the same but for rounding, and for the
# learning rate's end, which max_steps and cooldown_steps move
MAY_CHANGE = {"data_dir", "out_dir", "micro_batches", "max_steps", "cooldown_steps", "eval_interval", "log_interval",
              "save_interval", "max_bad_steps", "resume", "eval_only", "checkpoint", "predictions", "device", "dtype", "compile",
              "wandb_project"}


def nearest_parent(path):
    """The first part above `path` that exists: where its folders would have to be made."""
    return next(parent for parent in Path(path).absolute().parents if parent.exists())


# ----------------------------------------------------------------------------------------------------------------------
# checkpoints
# ----------------------------------------------------------------------------------------------------------------------

def take_architecture(config, saved, path, keys):
    """The architecture comes from the checkpoint; a knob that was set to something else is a contradiction."""
    for key in keys:
        if key not in saved["config"]:
            common.fail(f"{path} is no fine-tuned checkpoint (it knows no {key}); pretrained ones go to --pretrained=")
        if key in config.sources and getattr(config, key) != saved["config"][key]:
            common.fail(f"{key} = {getattr(config, key)!r}, but {path} has {saved['config'][key]!r}; leave "
                        f"{key} out, the checkpoint tells it")
        setattr(config, key, saved["config"][key])


def load_pretrained(path, config, geometry, data_dir):
    """A checkpoint of train.py or finetune.py, or one of the published PolarBERT code (.pth, or Lightning's .ckpt)."""
    saved = common.read_checkpoint(path)
    state = saved.get("state_dict", saved) if isinstance(saved, dict) else {}
    if not any(name.endswith("transformer_blocks.0.attention.wq.weight") for name in state):
        saved = common.load_checkpoint(path)
    else:
        try:
            knobs, state = from_published(state)
        except KeyError as error:
            common.fail(f"{path}: published PolarBERT weights, but not of the plain flash variant: {error.args[0]}; not supported")
        # without positions it does not tell the detector: it is IceCube; its file has scaled positions, rounded to float32
        known = state.setdefault("encoder.embedding.geometry", torch.from_numpy(geometry))
        if (known - torch.from_numpy(geometry)).abs().max() < 0.01:
            state["encoder.embedding.geometry"] = torch.from_numpy(geometry)
        # nor do shapes tell the number of heads and the activation: those are the config's
        saved = {"model": state, "config": {**dataclasses.asdict(ModelConfig()), **knobs, "num_heads": config.num_heads,
                                            "mlp": config.mlp}}
    common.check_geometry(saved, geometry, path, data_dir)
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
    knobs = {"embedding_dim": D, "dom_embed_dim": E, "num_layers": n_layers,
             "hidden_size": len(state["transformer_blocks.0.feed_forward.0.weight"]),
             "use_dom_positions": "embedding.position_embedding.weight" in state,
             "final_norm": "final_layer_norm.weight" in state}
    ours, mask = {"encoder.embedding.cls": cls}, state.pop("embedding.mask_token_embedding", torch.zeros(1, E))
    if knobs["use_dom_positions"]:
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
    return knobs, ours


def load_encoder(model, saved, path):
    """Copy the encoder of a pretrained (or fine-tuned) checkpoint. The head stays new, everything else must be there."""
    encoder = {name: value for name, value in saved["model"].items() if name.startswith("encoder.")}
    missing, unexpected = model.load_state_dict(encoder, strict=False)
    new_head = [name for name in model.state_dict() if not name.startswith("encoder.")]
    # DIFF(upstream): strict=False there, whatever is missing stays random without a word
    if missing != new_head or unexpected:
        common.fail(f"{path}: its encoder is not complete: missing {sorted(set(missing) - set(new_head))}, not known {unexpected}")


# ----------------------------------------------------------------------------------------------------------------------
# evaluation and predictions
# ----------------------------------------------------------------------------------------------------------------------

def event_losses(model, batch, config):
    """The loss of each event of a batch, (B,)."""
    return DIRECTION_LOSSES[config.direction_loss](model(batch), unit_vector(batch["azimuth"], batch["zenith"]))


def event_batches(split, index, n):
    return data.micro_batches(*data.read_events(split, index), n)


@torch.no_grad()
def predict(model, split, n_events, config, ranks, autocast):
    """Directions of the first n_events of the split, in their order, float32 (n_events, 3), on every rank."""
    mine = np.array_split(np.arange(n_events), ranks.world_size)[ranks.rank]
    n_chunks = -(-len(mine) * ranks.world_size // config.batch_size)
    chunks = np.array_split(mine, n_chunks) if n_chunks else []  # a rank may have none
    directions = np.empty((len(mine), 3), np.float32)
    model.eval()
    with common.progress_bar(len(mine), f"predict {split.path}", "event") as bar:
        loader = data.prefetch(lambda i: event_batches(split, chunks[i], config.micro_batches), range(len(chunks)), ranks.device)
        for chunk, batches in zip(chunks, loader):
            for batch in batches:
                with autocast:
                    direction = model(batch)
                directions[chunk[0] - mine[0] + batch["row"].cpu().numpy()] = direction.cpu().numpy()
            bar.update(len(chunk))
    model.train()
    return common.gather_over_ranks(directions, ranks)


def score(directions, split):
    """Angular error of directions (n, 3) for the first n events -> dict of val_*, in rad; empty without labels."""
    events = split.events[:len(directions)]
    if np.isnan(events["azimuth"]).any():
        return {}
    truth = unit_vector(*(torch.from_numpy(events[angle].copy()) for angle in ("azimuth", "zenith")))
    error = angular_error(torch.from_numpy(directions), truth)
    return {"val_loss": error.mean().item(), "val_angle_mean": error.mean().item(), "val_angle_median": error.median().item(),
            "standard_error": error.std(correction=0).item() / len(error) ** 0.5}  # of the mean, by the choice of events


def write_predictions(path, directions, split):
    """event_id, azimuth in [0, 2 pi), zenith in [0, pi] [rad], one row an event in the order of the data (Kaggle's form)."""
    x, y, z = directions.astype(np.float64).T
    azimuth = np.arctan2(y, x) % (2 * np.pi)
    azimuth[azimuth >= 2 * np.pi] = 0.0  # a tiny negative angle plus 2 pi rounds up to 2 pi
    table = pa.table({"event_id": split.events["event_id"][:len(directions)], "azimuth": azimuth,
                      "zenith": np.arccos(np.clip(z, -1, 1))})
    write = pyarrow.csv.write_csv if path.endswith(".csv") else pyarrow.parquet.write_table
    common.write_atomic(path, lambda part: write(table, part))
    print(f"predictions of {len(table):,} events in {path}")


# ----------------------------------------------------------------------------------------------------------------------

def main():
    config = common.load_config(FinetuneConfig, __doc__)
    ranks = common.start_device(config)
    autocast = torch.autocast(ranks.device.type, ranks.dtype, enabled=ranks.dtype != torch.float32)
    architecture = [field.name for field in dataclasses.fields(ModelConfig)]
    checkpoint_path, best_path = f"{config.out_dir}/ckpt.pt", f"{config.out_dir}/best.pt"

    # ---- data --------------------------------------------------------------------------------------------------------
    geometry = data.read_geometry(config.data_dir)
    val_split, n_val = data.open_first_events(config.data_dir, config.val_split, config.val_events)

    def evaluate_best(path, saved):
        """Evaluate a fine-tuned checkpoint, print and keep the result, write the predictions."""
        common.check_geometry(saved, geometry, path, config.data_dir)
        model = TASKS[config.task](config, geometry).to(ranks.device)
        model.load_state_dict(saved["model"])
        directions = predict(model, val_split, n_val, config, ranks, autocast)
        if not ranks.main:
            return
        metrics = score(directions, val_split)
        start = f"pretrained {saved['config']['pretrained']}" if saved["config"]["pretrained"] else "from scratch"
        result = f"{path} | {start} | {saved['n_train']:,} labels | {n_val:,} events of {config.val_split} | " + (
            f"angular error mean {metrics['val_angle_mean']:.4f} +- {metrics['standard_error']:.4f} rad, median "
            f"{metrics['val_angle_median']:.4f} rad" if metrics else "no labels, no angular error")
        print(result)
        if not config.eval_only:
            common.write_atomic(f"{config.out_dir}/result.txt", lambda part: part.write_text(result + "\n"))
        if config.predictions:
            write_predictions(config.predictions, directions, val_split)

    if config.eval_only:
        path = config.checkpoint or best_path
        saved = common.load_checkpoint(path)
        take_architecture(config, saved, path, [*architecture, "head_hidden_size", "task"])
        evaluate_best(path, saved)
        common.stop_device(ranks)
        return

    train_split, n_train = data.open_first_events(config.data_dir, config.train_split, config.train_events)
    for split, n in ((train_split, n_train), (val_split, n_val)):
        unknown = np.flatnonzero(np.isnan(split.events["azimuth"][:n]) | np.isnan(split.events["zenith"][:n]))
        if len(unknown):
            common.fail(f"{split.path}: {len(unknown):,} of {n:,} events have no direction, the first is event "
                        f"{split.events['event_id'][unknown[0]]}; choose a labelled split (or --eval_only=True to predict)")

    def load_step(step):
        """This rank's share of a step; the step's events do not depend on the number of ranks."""
        index, _ = data.step_events(step, config.batch_size, n_train, config.seed)
        return event_batches(train_split, np.array_split(index, ranks.world_size)[ranks.rank], config.micro_batches)

    # ---- model, optimizer, resume, compile, DDP ----------------------------------------------------------------------
    pretrained, is_started = None, os.path.exists(checkpoint_path)
    if config.pretrained:
        begin = checkpoint_path if is_started else config.pretrained  # a run that goes on has all that it needs
        pretrained = common.load_checkpoint(begin) if is_started else load_pretrained(begin, config, geometry, config.data_dir)
        take_architecture(config, pretrained, begin, architecture)
    saved = common.find_run(config, checkpoint_path, MAY_CHANGE)
    if saved:
        common.check_same(checkpoint_path, "labels in train_split", saved["n_train"], n_train)
        if saved["step"] >= config.max_steps:
            if ranks.main:
                print(f"{config.out_dir} is complete at step {saved['step']}; raise max_steps to go on, or choose another out_dir")
            evaluate_best(best_path, common.load_checkpoint(best_path))
            common.stop_device(ranks)
            return

    torch.manual_seed(config.seed)
    raw_model = TASKS[config.task](config, geometry)
    if pretrained and not saved:
        load_encoder(raw_model, pretrained, config.pretrained)
    raw_model.encoder.requires_grad_(not config.freeze_backbone)
    raw_model.to(ranks.device)
    optimizer = torch.optim.AdamW(parameter_groups(raw_model, config.weight_decay), lr=config.learning_rate,
                                  betas=(config.beta1, config.beta2), eps=config.adam_eps, fused=True)
    scaler = torch.amp.GradScaler(ranks.device.type, init_scale=2.0**10, enabled=ranks.dtype == torch.float16)
    first_step, best_val = 0, float("inf")
    bad_steps = bad_in_a_row = torch.zeros((), dtype=torch.int64, device=ranks.device)  # counted without waiting for the GPU
    if saved:
        raw_model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        if saved["scaler"] and scaler.is_enabled():
            scaler.load_state_dict(saved["scaler"])
        first_step, best_val, bad_steps = saved["step"], saved["best_val"], bad_steps + saved["bad_steps"]
    compiled_model = torch.compile(raw_model, dynamic=True) if config.compile else raw_model
    model = DistributedDataParallel(compiled_model) if ranks.world_size > 1 else compiled_model

    def save(path, step):
        common.save_checkpoint(path, model=raw_model.state_dict(), optimizer=optimizer.state_dict(),
                               scaler=scaler.state_dict(), step=step, best_val=best_val, bad_steps=bad_steps.item(),
                               n_train=n_train, config=dataclasses.asdict(config))

    if ranks.main:
        common.print_run_header(config, ranks, raw_model, n_train)
        common.write_json(f"{config.out_dir}/config.json", dataclasses.asdict(config))
        log = common.start_log(config, LOG_COLUMNS, first_step)
        if saved:
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

        if step % config.eval_interval == 0 or last_step:
            paused = time.perf_counter()
            row |= score(predict(compiled_model, val_split, n_val, config, ranks, autocast), val_split)
            if ranks.main:
                bar.write(f"eval {step:6d}/{config.max_steps} | angular error mean {row['val_angle_mean']:.4f} rad "
                          f"median {row['val_angle_median']:.4f} rad")
            if not np.isfinite(row["val_loss"]):
                common.fail(f"step {step}: val_loss is {row['val_loss']}; {config.out_dir} keeps the last good checkpoint, go on "
                            "with a smaller learning_rate")
            if row["val_loss"] < best_val and step > 0:
                best_val = row["val_loss"]
                if ranks.main:
                    save(best_path, step)
            clock += time.perf_counter() - paused
        if ranks.main and step > first_step and (step % config.save_interval == 0 or last_step):
            save(checkpoint_path, step)
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
        asked_to_stop, = common.sum_on_cpu([bool(caught)], ranks)  # any rank: then all do, after this step
        step_loss = 0.0
        for i, batch in enumerate(batches):
            # gradients are summed over ranks only after the last micro-batch
            syncs = nullcontext() if ranks.world_size == 1 or i == len(batches) - 1 else model.no_sync()
            with syncs:
                with autocast:
                    losses = event_losses(model, batch, config)
                loss = losses.sum() / config.batch_size  # a share of the whole step's mean
                scaler.scale(loss * ranks.world_size).backward()  # DDP takes the mean over ranks, the sum is meant
            step_loss += loss.detach()
        scaler.unscale_(optimizer)
        grad_norm = torch.nn.utils.clip_grad_norm_(raw_model.parameters(), config.grad_clip)
        is_bad = ~grad_norm.isfinite()
        optimizer.found_inf = is_bad.float()  # on the device: the fused kernel then changes nothing
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
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
                    losses = np.concatenate([event_losses(raw_model, batch, config).float().cpu().numpy() for batch in batches])
                event_ids = np.concatenate([batch["event_id"].cpu().numpy() for batch in batches])
                common.stop_bad_run(config, step, losses, event_ids, ranks)
            clock, clock_step, waited = now, step + 1, 0.0
        if ranks.main and (step % config.log_interval == 0 or "val_loss" in row):
            log(row)
        bar.update()

    bar.close()
    common.wait_for_all(ranks)  # rank 0 may still be writing best.pt
    evaluate_best(best_path, common.load_checkpoint(best_path))
    common.stop_device(ranks)


if __name__ == "__main__":
    common.run_stage(main)
