"""How fast is it? Ratios against a plain baseline that runs in turns with it.

    python -m tools.bench                                   # training step of the base model on data/demo, 4 minutes on 2 CPU cores
    python -m tools.bench --device=cuda --batch_size=4096 --micro_batches=8 --compile=True
    python -m tools.bench --what=backbones                  # transformer, GRU and Mamba at base width
    python -m tools.bench --what=prepare                    # full-size Kaggle batches, written for it (0.3 GB), 5 minutes

The training baseline does what the published code does: every event padded to max_pulses, logits at every
position, float32, unfused optimizer. The preparing baseline handles one event after another. Prints events/s
(median over rounds, with the spread) and the ratio; absolute numbers depend on the machine and on what else
runs there, ratios much less.
"""
import common  # first: it sets how torch's threads wait

import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F

import data
import knobs
import prepare
from model import MIXERS, ModelConfig, Pretrainer, parameter_groups


@dataclass
class BenchConfig(ModelConfig):
    what: str = "train"  # or "backbones", "prepare"
    data_dir: str = "data/demo"  # folder made by prepare.py
    split: str = "pretrain"  # whose events to use
    batch_size: int = 64  # events a step; 4096 on a GPU
    micro_batches: int = 4  # pieces of a step, sorted by length
    rounds: int = 5  # measurements of each arm, in turns
    steps: int = 2  # training steps in a measurement
    device: str = "auto"  # or "cuda", "mps", "cpu"
    dtype: str = "auto"  # of the fast arm: "bfloat16", "float16", "float32"; auto as in train.py
    compile: bool = False  # torch.compile for the fast arms
    n_events: int = 200_000  # of a batch file to prepare; 200,000 is Kaggle's

    def check(self):
        yield from super().check()
        yield from knobs.check_positive(self, "batch_size", "micro_batches", "rounds", "steps", "n_events")
        yield from knobs.check_choice(self, "what", ("train", "backbones", "prepare"))
        yield from knobs.check_device(self)


PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "L40S": 362e12}  # bfloat16, dense, NVIDIA's data sheets (SXM)


def print_rates(rates, more=lambda name, rate: ""):
    """rates: name -> events/s of each round; the first arm is the baseline. Ratios are taken within a round."""
    baseline = np.array(next(iter(rates.values())))
    for name, rate in rates.items():
        print(f"{name:<48} {np.median(rate):10,.1f} events/s ({min(rate):,.1f} to {max(rate):,.1f}) "
              f"{np.median(rate / baseline):6.2f} x{more(name, np.median(rate))}")


# ------------------------------------------------------------------------------------------------------------
# training step
# ------------------------------------------------------------------------------------------------------------

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
    return dom_loss, model.cls_losses(model.charge_head(x[:, 0]).squeeze(-1).float(), None, batch)


def synchronize(device):
    if device.type == "cuda":
        torch.cuda.synchronize()


def count_flops(config, steps, all_logits):
    """Floating-point operations of the matrix products of all steps, forward and backward, from the shapes (transformer)."""
    D, total = config.embedding_dim, 0
    for batch in (batch for batches in steps for batch in batches):
        B, L = batch["valid"].shape[0], batch["valid"].shape[1] + 1
        block = B * L * (4 * D * D + 2 * D * config.hidden_size) + 2 * B * L * L * D  # products, each a multiply and an add
        total += config.num_layers * block + (B * L if all_logits else len(batch["hidden"])) * D * data.N_DOMS
    return 2 * 3 * total  # the backward pass costs twice the forward


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
                batch = {name: value.to(device, non_blocking=True) for name, value in batch.items() if torch.is_tensor(value)}
                with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                    dom_loss, charge_loss = forward(called, batch)
                ((dom_loss.sum() + charge_loss.sum()) / config.batch_size).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        synchronize(device)
        return time.perf_counter() - start
    return run


def bench_train(config):
    """The step of train.py against the plain one, or the three backbones against each other."""
    ranks = common.start_device(config)
    geometry = data.read_geometry(config.data_dir)
    max_pulses = data.read_meta(config.data_dir)["max_pulses"]
    loaded = list(load_steps(config, config.steps))
    cut = [data.micro_batches(events, pulses, config.micro_batches, hidden) for events, pulses, hidden in loaded]

    def arm(dtype, forward, steps, fused=True, compiled=False, backbone=config.backbone):
        run = make_arm(replace(config, backbone=backbone), geometry, ranks.device, dtype, forward, steps, fused, compiled)
        return run, count_flops(config, steps, all_logits=forward is plain_losses)

    def call(model, batch):
        return model(batch)

    if config.what == "backbones":
        arms = {backbone: arm(ranks.dtype, call, cut, compiled=config.compile, backbone=backbone) for backbone in MIXERS}
    else:
        padded = [[padded_batch(*step, max_pulses)] for step in loaded]
        whole = [data.micro_batches(events, pulses, 1, hidden) for events, pulses, hidden in loaded]
        arms = {"padded, all logits, float32 (baseline)": arm(torch.float32, plain_losses, padded, fused=False),
                "padded, all logits, bfloat16": arm(torch.bfloat16, plain_losses, padded, fused=False),
                "logits at hidden pulses, float32": arm(torch.float32, call, whole),
                f"train.py: {config.micro_batches} cuts by length, {str(ranks.dtype).removeprefix('torch.')}":
                    arm(ranks.dtype, call, cut, compiled=config.compile)}
    rates, memory = {name: [] for name in arms}, {}
    with common.progress_bar((config.rounds + 1) * len(arms), "bench", "measurement") as bar:
        for i in range(config.rounds + 1):  # round 0 warms up
            for name, (run, _) in arms.items():
                if ranks.device.type == "cuda":
                    torch.cuda.reset_peak_memory_stats()
                seconds = run()
                if i:
                    rates[name].append(config.steps * config.batch_size / seconds)
                if ranks.device.type == "cuda":
                    memory[name] = torch.cuda.max_memory_allocated() / 1e9
                bar.update()
    n_pulses = np.concatenate([events["length"] for events, _, _ in loaded])
    where = torch.cuda.get_device_name() if ranks.device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    peak = next((flops for name, flops in PEAK_FLOPS.items() if name in where), None)

    def more(name, rate):
        text = f" | {rate * (n_pulses.mean() + 1):,.0f} pulses and [CLS]/s"
        flops = arms[name][1] / (config.steps * config.batch_size) * rate
        if config.what == "train":
            text += f" | {flops / 1e12:.3g} TFLOP/s" + (f", {flops / peak:.1%} of the peak" if peak else "")
        return text + (f" | {memory[name]:.1f} GB" if name in memory else "")
    print(f"torch {torch.__version__}, {where}, {config.batch_size} events a step, {n_pulses.mean():.0f} of {max_pulses} pulses")
    print_rates(rates, more)


# ------------------------------------------------------------------------------------------------------------
# preparing
# ------------------------------------------------------------------------------------------------------------

COLUMNS = ["time", "charge", "sensor_id", "auxiliary"]
N_BATCHES = 8  # links to one and the same file; Kaggle has 660, so the start of the processes must not count


def write_kaggle_batch(folder, n_events):
    """A batch in Kaggle's layout with Kaggle's lengths (median 62, 87 % up to 127, mean 164 by a long tail)."""
    rng = np.random.default_rng(0)
    body, tail = rng.lognormal(np.log(58), 0.45, n_events), 127 * (1 - rng.random(n_events)) ** (-1 / 1.2)
    n = np.where(rng.random(n_events) < 0.87, body.clip(15, 127), tail.clip(128, 110_000)).astype(np.int64)
    n[rng.integers(n_events, size=n_events // 2000)] *= 30
    n = np.minimum(n, 110_000)
    end, event_id = np.cumsum(n), np.sort(rng.choice(2**31, n_events, replace=False))
    time_key = np.sort((np.repeat(np.arange(n_events), n) << 20) + rng.integers(5_700, 20_000, end[-1]))
    (folder / "train").mkdir(parents=True)
    pq.write_table(pa.table({
        "sensor_id": rng.integers(0, data.N_DOMS, end[-1]).astype(np.int16), "time": time_key & (2**20 - 1),
        "charge": np.round(0.025 + 0.05 * np.rint(rng.gamma(2, 10, end[-1])), 3), "auxiliary": rng.random(end[-1]) < 0.72,
        "event_id": np.repeat(event_id, n)}), folder / "train/batch_1.parquet")
    for copy in range(2, N_BATCHES + 1):
        (folder / f"train/batch_{copy}.parquet").symlink_to("batch_1.parquet")
    meta = {"event_id": event_id, "first_pulse_index": end - n, "last_pulse_index": end - 1,
            "azimuth": rng.uniform(0, 2 * np.pi, n_events), "zenith": np.arccos(rng.uniform(-1, 1, n_events))}
    pq.write_table(pa.concat_tables(pa.table({"batch_id": np.full(n_events, copy), **meta})
                                    for copy in range(1, N_BATCHES + 1)), folder / "train_meta.parquet")
    position = rng.uniform(-500, 500, (data.N_DOMS, 3)).round(2).tolist()
    rows = "".join(f"{dom},{x},{y},{z}\n" for dom, (x, y, z) in enumerate(position))
    (folder / "sensor_geometry.csv").write_text("sensor_id,x,y,z\n" + rows)


def plain_loop(columns, geometry, start, end, max_pulses):
    """The baseline: one event after another, as the published code does it."""
    rng, done = np.random.default_rng(0), []
    for a, b in zip(start, end):
        time_, charge, dom, aux = (column[a:b] for column in columns)
        total, center = charge.sum(), (charge[:, None] * geometry[dom]).sum(axis=0) / charge.sum()
        if b - a > max_pulses:
            good, others = np.flatnonzero(~aux), np.flatnonzero(aux)
            keep = rng.choice(good, max_pulses, replace=False) if len(good) > max_pulses else \
                np.append(good, rng.choice(others, max_pulses - len(good), replace=False))
            keep.sort()
            time_, charge, dom, aux = time_[keep], charge[keep], dom[keep], aux[keep]
        pulses = np.empty(len(time_), data.PULSE)
        pulses["time"], pulses["charge"], pulses["dom"], pulses["aux"] = time_, charge, dom, aux
        done.append((total, center, pulses))
    return done


def seconds_of(function, *args):
    start = time.perf_counter()
    function(*args)
    return time.perf_counter() - start


def bench_prepare(config, folder):
    """The rule for events in memory, and whole runs of prepare.py over full-size batches, against a plain loop over events.

    The floor of a whole run is the decoding of the four columns, which the plain loop with reading is charged
    with as well.
    """
    write_kaggle_batch(folder / "raw", config.n_events)
    settings = prepare.PrepareConfig(input_dir=f"{folder}/raw", data_dir=f"{folder}/0", splits={"all": (1, N_BATCHES)})
    geometry = prepare.read_geometry_csv(folder / "raw/sensor_geometry.csv")
    batch, events = next(prepare.kaggle_jobs(settings, prepare.plan_kaggle(settings)))
    chunks = list(islice(prepare.kaggle_chunks(batch.path, events), 16))
    n_chunk_events = sum(len(part) for part, *_ in chunks)
    n_pulses = events["n_pulses"].sum(dtype=np.int64)
    print(f"{N_BATCHES} batch files of {config.n_events:,} events, {n_pulses:,} pulses")
    memory = []

    def loop():
        for part, *columns in chunks:
            end = np.cumsum(part["n_pulses"], dtype=np.int64)
            plain_loop(columns, geometry.T, end - part["n_pulses"], end, settings.max_pulses)

    def pack():
        for part, *columns in chunks:
            prepare.pack(part, *columns, geometry, settings)

    def decode():
        table = pq.read_table(batch.path, columns=COLUMNS, use_threads=False)
        return [table[name].to_numpy() for name in COLUMNS]

    def script(workers):
        """Prepare all batches in a fresh folder, noting the peak memory [GB] of the largest process."""
        code = ("import resource, subprocess, sys; subprocess.run(sys.argv[1:], check=True, capture_output=True); "
                "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1e6)")
        command = [sys.executable, "prepare.py", f"--input_dir={folder}/raw", f"--data_dir={folder}/{len(memory)}",
                   f"--workers={workers}", f"--splits={{'all': (1, {N_BATCHES})}}"]
        done = subprocess.run([sys.executable, "-c", code, *command], check=True, capture_output=True, text=True,
                              cwd=Path(__file__).parent.parent)
        memory.append(float(done.stdout))
        if len(memory) > 1:
            shutil.rmtree(folder / f"{len(memory) - 1}")

    rates = {name: [] for name in ("plain loop, events in memory (baseline)", "prepare.pack, the same events")}
    whole = {name: [] for name in ("plain loop and decoding (baseline)", "decoding four columns, the floor",
                                   "prepare.py, 1 worker", "prepare.py, 2 workers")}
    with common.progress_bar(config.rounds, "bench", "round") as bar:
        for _ in range(config.rounds):
            looped, packed = (seconds_of(arm) / n_chunk_events for arm in (loop, pack))
            read = seconds_of(decode) / config.n_events
            scripts = [seconds_of(script, workers) / (config.n_events * N_BATCHES) for workers in (1, 2)]
            for rate, seconds in zip((*rates.values(), *whole.values()), (looped, packed, looped + read, read, *scripts)):
                rate.append(1 / seconds)
            bar.update()
    print_rates(rates)
    print_rates(whole)
    print(f"peak memory of the largest process {max(memory):.2f} GB")

    split, rng = data.open_split(folder / "0", "all"), np.random.default_rng(0)
    for run_length in (1, data.RUN_LENGTH):
        indices = [(rng.integers(0, len(split) - run_length, (4096 // run_length, 1)) + np.arange(run_length)).ravel()
                   for _ in range(200)]
        for _ in range(2):  # the first time maps the pages
            seconds = seconds_of(lambda: [data.read_events(split, index) for index in indices])
        print(f"loader, random runs of {run_length}: {200 * 4096 / seconds / 1e6:.2f} M events/s from mapped pages")


def main():
    config = knobs.load_config(BenchConfig, __doc__)
    if config.what != "prepare":
        bench_train(config)
    else:
        with tempfile.TemporaryDirectory(prefix="bench_prepare") as folder:
            bench_prepare(config, Path(folder))


if __name__ == "__main__":
    common.run_stage(main)
