"""How fast is it? Ratios against a plain baseline that runs in turns with it.

    python -m tools.bench                                           # a training step of the base model
    python -m tools.bench --what=backbones                          # transformer, GRU, Mamba at base width
    python -m tools.bench --what=all --device=cuda --compile=True   # both, compiled
    python -m tools.bench --what=prepare                            # files simulated for it, minutes

The training baseline does what the published code does: every event padded to max_pulses, logits at every
position, float32, unfused optimizer. The preparing baseline handles one event after another. Prints events/s
(median over rounds, with the range) and the ratio; absolute numbers depend on the machine and on what else
runs there, ratios much less. No step is measured twice, so that new shapes cost what they cost in training.
"""
import common  # first: it sets how torch's threads wait

import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from functools import partial
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
import tables
from model import MIXERS, ModelConfig, Pretrainer, parameter_groups
from optimizers import GuardedOptimizer
from train import TrainConfig, make_optimizers, masked_batches


@dataclass
class BenchConfig(ModelConfig):
    what: str = "train"  # or "backbones", "all" for both, "prepare"
    data_dir: str = "data/demo"  # folder made by prepare.py
    split: str = "pretrain"  # whose events to use
    batch_size: int = 0  # events a step; 0 = 4096 on a GPU, 64 elsewhere
    micro_batch_sizes: str = ""  # events at once, an arm each; "" = 64,512,1024 on a GPU, 32 elsewhere
    rounds: int = 5  # measurements of each arm, in turns
    steps: int = 0  # training steps in a measurement; 0 = 10 on a GPU, 2 elsewhere
    device: str = "auto"  # or "cuda", "mps", "cpu"
    dtype: str = "auto"  # of the fast arms: "bfloat16", "float16", "float32"; auto as in train.py
    compile: bool = False  # train: compiled arms beside the eager ones; backbones: instead of them
    n_events: int = 50_000  # of a batch file to prepare; Kaggle's have 200,000

    def check(self):
        yield from super().check()
        yield from knobs.check_positive(self, "rounds", "n_events")
        yield from knobs.check_not_negative(self, "batch_size", "steps")
        yield from knobs.check_choice(self, "what", ("train", "backbones", "all", "prepare"))
        yield from knobs.check_device(self)
        if not all(size.strip().isdigit() and int(size) for size in self.micro_batch_sizes.split(",")
                   if self.micro_batch_sizes):
            yield f"micro_batch_sizes = {self.micro_batch_sizes!r}: numbers, separated by commas"


# bfloat16, dense, NVIDIA's data sheets (SXM)
PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "L40S": 362e12}


def print_rates(rates, more=lambda name, rate: ""):
    """rates: name -> events/s of each round; the first arm is the baseline; ratios are within a round."""
    baseline = np.array(next(iter(rates.values())))
    for name, rate in rates.items():
        print(f"{name:<48} {np.median(rate):10,.1f} events/s ({min(rate):,.1f} to {max(rate):,.1f}) "
              f"{np.median(rate / baseline):6.2f} x{more(name, np.median(rate))}")


# ------------------------------------------------------------------------------------------------------------
# training step
# ------------------------------------------------------------------------------------------------------------

def padded(batch, max_pulses):
    """A packed batch with every event padded to max_pulses, and [CLS], as upstream computes it."""
    lengths = batch["starts"].diff().long()
    B, L = len(lengths), max_pulses + 1
    event = torch.repeat_interleave(lengths)
    place = event * L + torch.arange(len(event)) - batch["starts"][event]
    new = {name: batch[name].new_zeros(B * L).index_copy(0, place, batch[name])
           for name in ("time", "charge", "dom", "aux")}
    new["hidden"] = place[batch["hidden"]]
    new["is_hidden"] = torch.zeros(B * L).index_fill(0, new["hidden"], 1.0).view(B, L)
    new["valid"] = torch.arange(L) < lengths[:, None]
    new["starts"] = torch.arange(0, B * L + 1, L, dtype=torch.int32)
    return batch | new


class PaddedRows:
    """Instead of model.Packing: each event fills a row of its own already, padding included."""

    def __init__(self, valid):
        self.valid = valid

    def unpack(self, x):
        return x.view(*self.valid.shape, -1)

    def pack(self, x):
        return x.flatten(0, 1)


def plain_losses(model, batch):
    """Logits of all V DOMs at all tokens, most of them multiplied by zero."""
    x, rows = model.encoder.embedding(batch), PaddedRows(batch["valid"])
    for block in model.encoder.backbone.blocks:
        x = block(x, rows)
    x = model.encoder.final_norm(x)
    loss = F.cross_entropy(model.dom_head(x), batch["dom"], reduction="none").view_as(batch["is_hidden"])
    dom_loss = (loss * batch["is_hidden"]).sum(1) / batch["is_hidden"].sum(1).clamp(min=1)
    cls = x[batch["starts"][:-1].long()]
    answers = {name: head(cls) for name, head in model.cls_heads.items()}
    return {"dom": dom_loss, **model.cls_losses(answers, batch)}


def count_flops(config, batch, n_doms):
    """Operations of the matrix products, forward and backward, of a transformer with a linear DOM head."""
    D, lengths = config.embedding_dim, batch["starts"].diff().double()
    n_tokens, is_plain = lengths.sum().item(), "is_hidden" in batch
    block = n_tokens * (4 * D * D + 2 * D * config.hidden_size) + 2 * lengths.square().sum().item() * D
    total = config.num_layers * block + (n_tokens if is_plain else batch["n_hidden"]) * D * n_doms
    return 2 * 3 * total  # a multiply and an add each; the backward pass costs twice the forward


class PlainOptimizer:
    """Instead of GuardedOptimizer: unfused, and nothing guarded."""

    def __init__(self, model, config):
        self.model, self.grad_clip = model, config.grad_clip
        self.adamw = torch.optim.AdamW(parameter_groups(model, config.weight_decay), lr=config.learning_rate)

    def backward(self, loss):
        loss.backward()

    def step(self):
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.grad_clip)
        self.adamw.step()
        self.adamw.zero_grad(set_to_none=True)


class Arm:
    """One way to train: its model and optimizer, and what it measured."""

    def __init__(self, config, geometry, split, process, dtype, is_plain=False):
        torch.manual_seed(0)
        self.config, self.split, self.process, self.is_plain = config, split, process, is_plain
        model = Pretrainer(config, geometry).to(process.device)
        if is_plain:
            self.losses, self.optimizer = partial(plain_losses, model), PlainOptimizer(model, config)
            for block in model.encoder.backbone.blocks:
                block.mixer.can_flash = False  # the flash kernel takes no mask
        else:
            self.losses = common.compiled_and_distributed(model, config, process)
            self.optimizer = GuardedOptimizer(model, make_optimizers(model, config), config, process)
        self.autocast = torch.autocast(process.device.type, dtype, enabled=dtype != torch.float32)
        self.max_pulses, self.n_doms = data.read_meta(config.data_dir)["max_pulses"], len(geometry)
        self.rates, self.flops, self.n_tokens, self.n_events, self.memory, self.launches = [], 0, 0, 0, 0, 0

    def load(self, step):
        index, epoch = data.step_events(step, self.config.batch_size, len(self.split), seed=0)
        batches = masked_batches(self.split, index, epoch, self.config, seed=0)
        return [padded(batch, self.max_pulses) for batch in batches] if self.is_plain else batches

    def train(self, batches):
        for batch in batches:
            with self.autocast:
                losses = self.losses(batch)
            self.optimizer.backward(sum(loss.sum() for loss in losses.values()) / self.config.batch_size)
        self.optimizer.step()

    def measure(self, steps):
        """Train on these steps, prefetched as train.py does."""
        on_cuda = self.process.device.type == "cuda"
        if on_cuda:
            torch.cuda.reset_peak_memory_stats()
            torch.cuda.synchronize()
        seen = []
        start = time.perf_counter()
        for batches in data.prefetch(self.load, steps, self.process.device):
            self.train(batches)
            seen += batches
        if on_cuda:
            torch.cuda.synchronize()
            self.memory = torch.cuda.max_memory_allocated() / 1e9
        self.rates.append(len(steps) * self.config.batch_size / (time.perf_counter() - start))
        self.flops += sum(count_flops(self.config, batch, self.n_doms) for batch in seen)
        self.n_tokens += sum(int(batch["starts"][-1]) for batch in seen)
        self.n_events += len(steps) * self.config.batch_size

    def count_launches(self, step):
        """What a step of one micro-batch starts on a GPU: kernels, copies, the optimizer's."""
        from torch.profiler import DeviceType, ProfilerActivity, profile
        batches, = data.prefetch(self.load, [step], self.process.device)
        with profile(activities=[ProfilerActivity.CUDA], acc_events=True) as profiled:
            self.train(batches[:1])
            torch.cuda.synchronize()
        self.launches = sum(event.device_type == DeviceType.CUDA for event in profiled.events())


def bench_train(config):
    """The step of train.py against the plain one, or the three backbones against each other."""
    process = common.start_process(config)
    on_cuda = process.device.type == "cuda"
    geometry, split = data.read_geometry(config.data_dir), data.open_split(config.data_dir, config.split)
    model_knobs = asdict(ModelConfig()).keys()
    train_config = TrainConfig(**{key: value for key, value in asdict(config).items() if key in model_knobs},
                               batch_size=config.batch_size or (4096 if on_cuda else 64),
                               data_dir=config.data_dir)
    sizes = config.micro_batch_sizes or ("64,512,1024" if on_cuda else "32")
    sizes, n_steps = [int(size) for size in sizes.split(",")], config.steps or (10 if on_cuda else 2)
    name_of_dtype = str(process.dtype).removeprefix("torch.")
    arms = {}

    def add(name, size, dtype=process.dtype, is_plain=False, **knobs):
        arm_config = replace(train_config, micro_batch_size=size, **knobs)
        arms[name] = Arm(arm_config, geometry, split, process, dtype, is_plain)

    if config.what == "backbones":
        for backbone in MIXERS:
            add(backbone, sizes[-1], backbone=backbone, compile=config.compile)
    else:
        size = min(sizes[-1], 512)  # more would not fit into a GPU's memory
        add("padded, all logits, float32 (baseline)", size, torch.float32, is_plain=True)
        if process.dtype != torch.float32:
            add(f"padded, all logits, {name_of_dtype}", size, is_plain=True)
        for size in sizes:
            add(f"train.py: packed, {size} at once, {name_of_dtype}", size)
            if config.compile:
                add(f"train.py: packed, {size} at once, {name_of_dtype}, compiled", size, compile=True)
    with common.progress_bar((config.rounds + 1) * len(arms), "bench", "measurement") as bar:
        for i in range(config.rounds + 1):  # round 0 warms up
            for arm in arms.values():
                arm.measure(range(i * n_steps, (i + 1) * n_steps))
                bar.update()
    for arm in arms.values():
        arm.rates = arm.rates[1:]
        if on_cuda:
            arm.count_launches((config.rounds + 1) * n_steps)

    where = torch.cuda.get_device_name() if on_cuda else f"{torch.get_num_threads()} CPU threads"
    peak = next((flops for name, flops in PEAK_FLOPS.items() if name in where), None)

    def more(name, rate):
        arm = arms[name]
        text = f" | {rate * arm.n_tokens / arm.n_events:,.0f} tokens/s"
        if config.what == "train" and (train_config.backbone, train_config.dom_head) == (
                "transformer", "linear"):  # what count_flops counts
            flops = arm.flops / arm.n_events * rate
            text += f" | {flops / 1e12:.3g} TFLOP/s" + (f", {flops / peak:.1%} of the peak" if peak else "")
        if on_cuda:
            text += f" | {arm.launches:,} launches (a micro-batch, the optimizer) | {arm.memory:.1f} GB"
        return text

    print(f"torch {torch.__version__}, {where}, {train_config.batch_size} events a step, "
          f"{split.events['length'].mean():.0f} pulses an event, at most "
          f"{data.read_meta(config.data_dir)['max_pulses']}")
    print_rates({name: arm.rates for name, arm in arms.items()}, more)
    arm = list(arms.values())[-1]
    arm.config = replace(arm.config, batch_size=4096, micro_batch_size=512)
    seconds = seconds_of(lambda: [arm.load(step) for step in range(5)])
    print(f"loader, one thread: {5 * 4096 / seconds:,.0f} masked and packed events/s, 512 of 4096 at once")


# ------------------------------------------------------------------------------------------------------------
# preparing
# ------------------------------------------------------------------------------------------------------------

COLUMNS = ["time", "charge", "sensor_id", "auxiliary"]
N_BATCHES = 8  # links to one and the same file; Kaggle has 660, so the start of the processes must not count


def simulate_batches(folder, n_events):
    """A batch file of simulated events, and links to it as if it were N_BATCHES."""
    subprocess.run([sys.executable, "simulate.py", f"--out_dir={folder}", f"--n_events={n_events}",
                    f"--events_per_batch={n_events}", "--n_test_events=0"], check=True,
                   cwd=Path(__file__).parent.parent, stdout=subprocess.DEVNULL)
    for copy in range(2, N_BATCHES + 1):
        (folder / f"train/batch_{copy}.parquet").symlink_to("batch_1.parquet")
    meta = pq.read_table(folder / "train_meta.parquet")
    place = meta.column_names.index("batch_id")
    pq.write_table(pa.concat_tables(
        meta.set_column(place, meta.schema.field("batch_id"),
                        pa.array([copy] * n_events, meta.schema.field("batch_id").type))
        for copy in range(1, N_BATCHES + 1)), folder / "train_meta.parquet")


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
    """The rule for events in memory, and whole runs of prepare.py, against a plain loop over events.

    The floor of a whole run is the decoding of the four columns; the plain loop is charged with it as well.
    """
    simulate_batches(folder / "raw", config.n_events)
    settings = prepare.PrepareConfig(input_dir=f"{folder}/raw", data_dir=f"{folder}/0",
                                     splits={"all": (1, N_BATCHES)})
    detector = tables.read_detector(folder / "raw/sensor_geometry.csv")
    batch, events = next(prepare.kaggle_jobs(settings, prepare.plan_kaggle(settings)))
    chunks = list(islice(prepare.kaggle_chunks(batch.path, events, len(detector)), 16))
    n_chunk_events = sum(len(part) for part, *_ in chunks)
    n_pulses = events["n_pulses"].sum(dtype=np.int64)
    print(f"{N_BATCHES} batch files of {config.n_events:,} events, {n_pulses:,} pulses")
    memory = []

    def loop():
        for part, *columns in chunks:
            end = np.cumsum(part["n_pulses"], dtype=np.int64)
            plain_loop(columns, detector.position.T, end - part["n_pulses"], end, settings.max_pulses)

    def pack():
        for part, *columns in chunks:
            prepare.pack(part, *columns, detector, settings)

    def decode():
        table = pq.read_table(batch.path, columns=COLUMNS, use_threads=False)
        return [table[name].to_numpy() for name in COLUMNS]

    def script(workers):
        """Prepare all batches in a fresh folder, noting the peak memory [GB] of the largest process."""
        code = ("import resource, subprocess, sys; subprocess.run(sys.argv[1:], check=True, "
                "capture_output=True); print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1e6)")
        command = [sys.executable, "prepare.py", f"--input_dir={folder}/raw",
                   f"--data_dir={folder}/{len(memory)}", f"--workers={workers}",
                   f"--splits={{'all': (1, {N_BATCHES})}}"]
        done = subprocess.run([sys.executable, "-c", code, *command], check=True, capture_output=True,
                              text=True, cwd=Path(__file__).parent.parent)
        memory.append(float(done.stdout))
        if len(memory) > 1:
            shutil.rmtree(folder / f"{len(memory) - 1}")

    rates = {name: [] for name in ("plain loop, events in memory (baseline)",
                                   "prepare.pack, the same events")}
    whole = {name: [] for name in ("plain loop and decoding (baseline)", "decoding four columns, the floor",
                                   "prepare.py, 1 worker", "prepare.py, 2 workers")}
    with common.progress_bar(config.rounds, "bench", "round") as bar:
        for _ in range(config.rounds):
            looped, packed = (seconds_of(arm) / n_chunk_events for arm in (loop, pack))
            read = seconds_of(decode) / config.n_events
            scripts = [seconds_of(script, workers) / (config.n_events * N_BATCHES) for workers in (1, 2)]
            for rate, seconds in zip((*rates.values(), *whole.values()),
                                     (looped, packed, looped + read, read, *scripts)):
                rate.append(1 / seconds)
            bar.update()
    print_rates(rates)
    print_rates(whole)
    print(f"peak memory of the largest process {max(memory):.2f} GB")

    split, rng = data.open_split(folder / "0", "all"), np.random.default_rng(0)
    for size in (1, data.GROUP_SIZE):
        first = rng.integers(0, len(split) - size, (200, 4096 // size, 1))
        indices = (first + np.arange(size)).reshape(200, -1)
        for _ in range(2):  # the first time maps the pages
            seconds = seconds_of(lambda: [data.read_events(split, index) for index in indices])
        print(f"loader, random groups of {size}: {200 * 4096 / seconds / 1e6:.2f} M events/s from mapped "
              "pages")


def main():
    config = knobs.load_config(BenchConfig, __doc__)
    for what in ("train", "backbones"):
        if config.what in (what, "all"):
            bench_train(replace(config, what=what))
    if config.what == "prepare":
        with tempfile.TemporaryDirectory(prefix="bench_prepare") as folder:
            bench_prepare(config, Path(folder))


if __name__ == "__main__":
    common.run_stage(main)
