"""How fast is a training step? Ratios against a plain baseline that runs in turns with it, in the same process.

    python bench.py                                   # base model on data/demo, 2 minutes on a CPU
    python bench.py --device=cuda --batch_size=4096 --compile=True

The baseline does what the published code does: every event padded to max_pulses, logits at every position, float32,
unfused optimizer. Prints events/s (median over rounds, with the spread) and the ratio to the baseline; absolute numbers
depend on the machine and on what else runs there, ratios much less.
"""
import common  # first: it sets how torch's threads wait

import time
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

import data
from model import ModelConfig, Pretrainer, charge_losses, parameter_groups


@dataclass
class BenchConfig(ModelConfig):
    data_dir: str = "data/demo"  # folder made by prepare.py
    split: str = "pretrain"  # whose events to use
    batch_size: int = 64  # events a step; 4096 on a GPU
    micro_batches: int = 4  # pieces of a step, sorted by length
    rounds: int = 5  # measurements of each arm, in turns
    steps: int = 2  # training steps in a measurement
    device: str = "auto"  # or "cuda", "mps", "cpu"
    dtype: str = "auto"  # of the fast arm: "bfloat16", "float16", "float32"; auto as in train.py
    compile: bool = False  # torch.compile for the fast arms

    def check(self):
        yield from super().check()
        yield from common.check_positive(self, "batch_size", "micro_batches", "rounds", "steps")


def load_steps(config, n_steps):
    """The events of some steps with a quarter of their good pulses hidden, read once: loading is not measured here."""
    split = data.open_split(config.data_dir, config.split)
    for step in range(n_steps):
        events, pulses = data.read_events(split, data.step_events(step, config.batch_size, len(split), seed=0)[0])
        draw = data.uniform_hash(0, 0, data.pulse_places(events))
        yield events, pulses, (draw < 0.25) & ~pulses["aux"]


def padded_batch(events, pulses, hidden, max_pulses):
    """One batch with every event padded to max_pulses, as upstream computes it."""
    batch, = data.micro_batches(events, pulses, 1, hidden)
    B, L = batch["valid"].shape
    is_hidden = torch.zeros(B * L, dtype=torch.bool).index_fill(0, batch["hidden"], True).view(B, L)
    for name in ("time", "charge", "dom", "aux", "valid"):
        batch[name] = F.pad(batch[name], (0, max_pulses - L))
    batch["is_hidden"] = F.pad(is_hidden, (0, max_pulses - L))
    batch["hidden"] = batch["is_hidden"].flatten().nonzero().squeeze(1)
    return batch


def plain_losses(model, batch):
    """Logits of all V DOMs at all L positions, most of them multiplied by zero."""
    x = model.encoder(batch)
    logits = model.dom_head(x[:, 1:])  # (B, L, V)
    loss = F.cross_entropy(logits.flatten(0, 1), batch["dom"].flatten(), reduction="none").view_as(batch["dom"])
    dom_loss = (loss * batch["is_hidden"]).sum(1) / batch["is_hidden"].sum(1).clamp(min=1)
    return dom_loss, charge_losses(model.charge_head(x[:, 0]).squeeze(-1), batch["total_charge"])


def synchronize(device):
    if device.type == "cuda":
        torch.cuda.synchronize()


def make_arm(config, geometry, device, dtype, forward, steps, fused, compiled=False):
    """A function that runs all `steps` (each a list of batches) once, as a training loop would, and gives the seconds."""
    torch.manual_seed(0)
    model = Pretrainer(config, geometry).to(device)
    called = torch.compile(model, dynamic=True) if compiled else model
    optimizer = torch.optim.AdamW(parameter_groups(model, 0.1), lr=1e-4, fused=fused)

    def run():
        synchronize(device)
        start = time.perf_counter()
        for batches in steps:
            for batch in batches:
                batch = {name: value.to(device, non_blocking=True) for name, value in batch.items()}
                with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                    dom_loss, charge_loss = forward(called, batch)
                ((dom_loss.sum() + charge_loss.sum()) / config.batch_size).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        synchronize(device)
        return time.perf_counter() - start
    return run


def main():
    config = common.load_config(BenchConfig, __doc__)
    ranks = common.start_device(config)
    geometry = data.read_geometry(config.data_dir)
    max_pulses = data.read_meta(config.data_dir)["max_pulses"]
    loaded = list(load_steps(config, config.steps))
    padded = [[padded_batch(*step, max_pulses)] for step in loaded]
    whole = [data.micro_batches(events, pulses, 1, hidden) for events, pulses, hidden in loaded]
    cut = [data.micro_batches(events, pulses, config.micro_batches, hidden) for events, pulses, hidden in loaded]

    def arm(dtype, forward, steps, fused=True, compiled=False):
        return make_arm(config, geometry, ranks.device, dtype, forward, steps, fused, compiled)

    def call(model, batch):
        return model(batch)

    arms = {"padded, all logits, float32 (baseline)": arm(torch.float32, plain_losses, padded, fused=False),
            "padded, all logits, bfloat16": arm(torch.bfloat16, plain_losses, padded, fused=False),
            "logits at hidden pulses, float32": arm(torch.float32, call, whole),
            f"train.py: {config.micro_batches} micro-batches by length, {str(ranks.dtype).removeprefix('torch.')}":
                arm(ranks.dtype, call, cut, compiled=config.compile)}
    rates = {name: [] for name in arms}
    with common.progress_bar((config.rounds + 1) * len(arms), "bench", "measurement") as bar:
        for i in range(config.rounds + 1):  # round 0 warms up
            for name, run in arms.items():
                seconds = run()
                if i:
                    rates[name].append(config.steps * config.batch_size / seconds)
                bar.update()

    n_pulses = np.concatenate([events["length"] for events, _, _ in loaded])
    where = torch.cuda.get_device_name() if ranks.device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    print(f"torch {torch.__version__}, {where}, {config.batch_size} events a step, {n_pulses.mean():.0f} of {max_pulses} pulses")
    baseline = np.median(next(iter(rates.values())))
    for name, rate in rates.items():
        print(f"{name:<52} {np.median(rate):8.1f} events/s ({min(rate):.1f}-{max(rate):.1f}) {np.median(rate) / baseline:6.2f} x")


if __name__ == "__main__":
    main()
