"""Measure speed against a plain baseline that runs in turns with ours.

    python -m tools.bench  all, minutes on 2 CPU cores
    python -m tools.bench --what=base --compile=True     base.py's size, on a GPU

base, demo: a training step; the baseline pads to the longest event. Model,
losses, optimizer and precision are the same. loader, prepare: the baseline
takes one event at a time. Trust the ratios: events/s vary with the load.
"""
import utils  # before torch

import runpy
import time
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import torch

import data
from model import PolarBERT, cls_loss
from optim import clip_and_step, make_optimizers
from prepare import PrepareConfig, pack
from train import TrainConfig, masked_batches, total_loss

@dataclass
class BenchConfig:
    what: str = "base,demo,loader,prepare"  # separated by commas
    data_dir: str = "data/demo"  # folder that prepare.py wrote
    rounds: int = 5  # measurements, after one to warm up
    batch_size: int = 0  # events in each; 0 = 4096, but 128 on a CPU
    micro_batch_size: int = 0  # events at once; 0 = what suits the device
    device: utils.Device = "auto"  # auto: a GPU if there is one
    dtype: utils.Dtype = "auto"  # of both steps
    compile: bool = False  # torch.compile our step

def make_training(config, name, is_plain):
    """Return a function(round) that trains a step, and its number of events."""
    device, dtype, autocast = utils.init_distributed(config)
    meta, _ = data.read_folder(config.data_dir)
    split = data.open_split(config.data_dir, "pretrain")
    options = runpy.run_path(f"sample_config/{name if name == 'demo' else 'base'}.py")
    run = TrainConfig(**{key: x for key, x in options.items() if key[0] != "_"})
    run.batch_size = config.batch_size or (4096 if device.type == "cuda" else 128)
    fitting = data.fitting_micro_batch_size(run, device, meta)
    run.micro_batch_size = config.micro_batch_size or fitting

    def load(step):
        index, epoch = data.step_events(step, run.batch_size, len(split.events), seed=0)
        if not is_plain:
            return masked_batches(split, index, epoch, run, seed=0)
        parts = np.array_split(index, -(-len(index) // run.micro_batch_size))
        return [plain_batch(split, part, run) for part in parts]
    if name == "loader":
        return load, run.batch_size
    model = PolarBERT(run, split.geometry).to(device)
    optimizers = make_optimizers(model, run)
    forward = torch.compile(model, dynamic=True) if config.compile else model
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    loader = data.prefetch(load, range(config.rounds + 1), device)

    def train(i):
        for batch in next(loader):
            with autocast:
                losses = plain_losses(model, batch) if is_plain else forward(batch)
            scaler.scale(total_loss(losses, run).sum() / run.batch_size).backward()
        model.dom_head.bias.grad[0].item()  # wait
        start = time.perf_counter()
        clip_and_step(model, optimizers, scaler, run.learning_rate, run.grad_clip)
        model.dom_head.bias[0].item()
        return time.perf_counter() - start
    return train, run.batch_size

def plain_batch(split, index, run):
    """Load, mask and pad events one by one -> a batch of B * L tokens."""
    events, strings = split.events[index], split.geometry["string"]
    shape = len(index), int(events["length"].max()) + 1
    pulses, rng = np.zeros(shape, data.PULSE), np.random.default_rng(index[0])
    valid, is_masked = np.zeros((2, *shape), bool)
    for i, event in enumerate(events):
        n = event["length"]
        row = pulses[i, 1:n + 1]  # after [CLS]
        row[:] = split.pulses[event["start"]:event["start"] + n]
        unit = strings[row["dom"]] if run.mask_unit == "string" else np.arange(n)
        number = np.where(row["aux"], 2, rng.random(unit.max() + 1)[unit])
        is_masked[i, 1:n + 1] = (number <= max(run.mask_prob, number.min())) & ~row["aux"]
        valid[i, :n + 1] = True
    batch = {name: pulses[name].ravel() for name in data.PULSE.names}
    batch |= {name: events[name].copy() for name in ("total_charge", "line_fit")}
    batch |= {"valid": valid, "masked": np.flatnonzero(is_masked),
              "masked_event": is_masked.nonzero()[0], "dom": batch["dom"].astype(int),
              "cu_seqlens": shape[1] * np.arange(len(index) + 1, dtype=np.int32)}
    return {name: torch.from_numpy(x) for name, x in batch.items()}

def plain_losses(model, batch):
    """Return what PolarBERT.forward returns, from padded events."""
    valid, dtype = batch["valid"], model.dom_head.bias.dtype  # (B, L)
    rows = SimpleNamespace(valid=valid, pad=lambda x: x.view(*valid.shape, -1),
                           unpad=lambda x: x.flatten(0, 1))  # as model.Packing
    x = model.encoder.embedding(batch)
    for block in model.encoder.blocks:
        block.mixer.can_flash = False  # it has no mask
        x = block(x, rows)
    x = model.encoder.final_norm(x)
    logits = model.dom_head(x[batch["masked"]]).to(dtype)
    losses = {name: cls_loss(name, head(rows.pad(x)[:, 0]).to(dtype), batch)[0]
              for name, head in model.cls_heads.items()}
    return {"dom": model.dom_loss(logits, batch), **losses}

def make_preparing(config, name, is_plain):
    """Return a function(round) that packs made-up events, and B."""
    B, rng = config.batch_size or 4096, np.random.default_rng(0)
    n = rng.lognormal(np.log(62), 1.4, B).clip(15).astype(np.int64)
    end, P = n.cumsum(), n.sum()
    geometry = data.read_folder(config.data_dir)[1]
    position = geometry["position"].astype(float)
    events = np.zeros(B, data.EVENT)
    events["event_id"], events["n_pulses"] = np.arange(B), n
    time = 1e4 + np.arange(P) - np.repeat(end - n, n)  # [ns]
    charge, aux = rng.exponential(1, P), rng.random(P) < 0.7
    columns = time, charge, rng.integers(len(position), size=P), aux
    def ours(i):
        pack(events, *columns, (position, geometry["string"].astype(int)), PrepareConfig())
    def plain(i):
        for a, b in zip(end - n, end):
            kept = a + np.sort(np.argsort(rng.random(b - a) + aux[a:b])[:127])
            _, charge, dom, _ = (x[a:b] for x in columns)
            charge @ position[dom] / charge.sum()  # the centre
            np.rec.fromarrays([x[kept] for x in columns], data.PULSE)
    return plain if is_plain else ours, B

def main():
    config = utils.load_config(BenchConfig, __doc__)
    for name in config.what.split(","):
        make = make_preparing if name == "prepare" else make_training
        functions = {who: make(config, name, is_plain=who == "baseline")
                     for who in ("baseline", "ours")}
        rates, waits = ({"baseline": [], "ours": []} for _ in range(2))  # [events/s], [s]
        for i in range(config.rounds + 1):
            for who, (function, n_events) in functions.items():
                start = time.perf_counter()
                waits[who].append(function(i))
                rates[who].append(n_events / (time.perf_counter() - start))
        for who, rate in rates.items():
            low, middle, high = np.quantile(rate[1:], (0, 0.5, 1))  # 0 is to warm up
            ratio = np.median(np.divide(rate, rates["baseline"])[1:])
            wait = np.median(waits[who]) if name in ("base", "demo") else 0  # optimizer
            print(f"{name:<8}{who:<9}{middle:9,.0f} events/s ({low:,.0f} to {high:,.0f})"
                  f"{ratio:7.2f} x", f"  optimizer {1e3 * wait:.1f} ms" if wait else "", flush=True)

if __name__ == "__main__":
    utils.run_main(main)
