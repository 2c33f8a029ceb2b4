"""Plumbing that the stages share and a reader may skip: errors, files, workers, ranks, checkpoints, log.csv.

torch is imported where it is needed: simulate.py, prepare.py and their worker processes do without.
"""
import csv
import dataclasses
import importlib.util
import json
import math
import multiprocessing
import os
import shlex
import signal
import sys
import threading
import time
import warnings
import zlib
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

# Read when torch is loaded, so the stages import common first. By default OpenMP's threads keep a core busy
# while they wait: 12 % faster on an idle machine, but 4 times slower on one that does something else as well.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
from tqdm import tqdm

CHECKPOINT_FORMAT = 2
DIVERGED_STATUS = 3  # exit status of a run whose loss or weights are not finite any more; other errors have 1
bars_on_screen = []
# The group of ranks is kept here to the end. Were a DDP model the last to hold it, its end would wait for the
# group's threads, and these for python's lock, which the model has then (torch 2.13, gloo).
groups_of_ranks = []


class Diverged(SystemExit):
    """The end of a run that a smaller learning rate might have saved; it has an exit status of its own."""


def fail(message, kind=SystemExit):
    """End the program with one clear line on stderr and exit status 1; kind = Diverged: DIVERGED_STATUS."""
    raise kind(f"error: {message}")


def is_main_process():
    return int(os.environ.get("RANK", 0)) == 0  # set by torchrun


def run_stage(main):
    """Call a script's main(). One line ends errors of users, Ctrl-C, a full GPU, a dead rank, no compiler."""
    try:
        try:
            main()
        except KeyboardInterrupt:
            if is_main_process():
                print("\nstopped; nothing finished is lost, give the same command again", file=sys.stderr)
            raise SystemExit(130) from None
        except RuntimeError as error:  # torch's errors, told by their names: prepare.py does not import torch
            if type(error).__name__ == "OutOfMemoryError":
                fail(f"out of GPU memory ({first_line(error)}); lower micro_batch_size")
            if "gloo" in str(error) and "onnection" in str(error):
                fail("lost another rank, which died; the same command goes on from the last checkpoint")
            if type(error).__name__ in ("InductorError", "BackendCompilerFailed", "TritonMissing",
                                        "GPUTooOldForTriton"):
                fail(f"torch.compile failed ({first_line(error)}); --compile=False does without")
            raise
    except SystemExit as end:
        if isinstance(end.code, str):
            print_error(end.code)
            raise SystemExit(DIVERGED_STATUS if isinstance(end, Diverged) else 1) from None
        raise


def print_error(line):
    """Print the line below all bars; rank 0 alone if all ranks have the same one, else each with its rank."""
    for bar in bars_on_screen:
        bar.close()
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        if not all_ranks_say(line):
            line = line.replace("error: ", f"error: rank {os.environ['RANK']}: ", 1)
        elif not is_main_process():
            time.sleep(1)  # torchrun stops all ranks as soon as one has ended: rank 0 speaks first
            return
    print(line, file=sys.stderr, flush=True)


def all_ranks_say(line):
    """Whether all ranks call this with the same line within 3 s. They count in torchrun's store."""
    from torch.distributed import TCPStore
    world_size = int(os.environ["WORLD_SIZE"])
    key = f"error {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)} {zlib.crc32(line.encode())}"
    try:
        store = TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]),
                         timeout=timedelta(seconds=3))
        count = store.add(key, 1)
        for _ in range(30):
            if count == world_size:
                break
            time.sleep(0.1)
            count = store.add(key, 0)
        return count == world_size
    except (RuntimeError, KeyError):  # no store, or it has gone: then every rank speaks for itself
        return False


# ------------------------------------------------------------------------------------------------------------
# files and bars
# ------------------------------------------------------------------------------------------------------------

def write_atomic(path, write):
    """Call write(temporary path), then rename: the file at `path` is the old one or the whole new one."""
    part = Path(f"{path}.part")
    try:
        part.parent.mkdir(parents=True, exist_ok=True)
        write(part)
        with open(part, "r+b") as file:
            os.fsync(file.fileno())  # first the bytes, then the name: else a power cut leaves an empty file
        os.replace(part, path)
    except (OSError, RuntimeError) as error:  # torch.save reports a full disk as RuntimeError
        if part.is_file():
            part.unlink()
        fail(f"{path}: cannot be written ({error}); free some space or choose another folder. "
             "What was there before is untouched")


def write_json(path, content):
    write_atomic(path, lambda part: part.write_text(json.dumps(content, indent=1) + "\n"))


def read_json(path):
    try:
        return json.loads(Path(path).read_text())
    except OSError as error:
        fail(f"{path}: cannot be read ({error.strerror})")
    except ValueError:
        fail(f"{path}: not valid JSON; it is damaged, remove it and run the command that wrote it again")


def check_settings(folder, found, settings, knob):
    """Refuse a folder that was made with other settings. knob: the one that names another folder."""
    for key, value in settings.items():
        if found.get(key) != value:
            fail(f"{folder} was made with {key} = {found.get(key)!r}, now it is {value!r}; set it back, "
                 f"choose another {knob}, or start anew after: rm -r {shlex.quote(str(folder))}")


def first_line(error):
    return (str(error).splitlines() or [type(error).__name__])[0][:120]


def progress_bar(total, desc, unit, initial=0):
    """A tqdm bar on stderr of rank 0; redrawn twice a second on a terminal, every 10 s in a log file."""
    bar = tqdm(total=total, desc=desc, unit=unit, initial=initial, disable=not is_main_process(),
               unit_scale=total > 9999, mininterval=0.5 if sys.stderr.isatty() else 10, dynamic_ncols=True)
    if not is_main_process():
        bar.write = lambda text: None
    still_open = [other for other in bars_on_screen if not other.disable]  # closing a bar disables it
    bars_on_screen[:] = [*still_open, bar]
    return bar


def hold_lock(folder):
    """Keep other runs out of a folder -> the open lock file, or None where there are no locks.

    The lock lasts as long as the file is open; the system releases it, however the process ends. Windows and
    some network disks have none.
    """
    if importlib.util.find_spec("fcntl") is None:
        return None
    import fcntl
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        file = open(Path(folder) / ".lock", "w", encoding="utf-8")
    except OSError as error:
        fail(f"{folder}: cannot be written ({error.strerror}); choose another folder")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        fail(f"{folder}: another run is at work there; wait until it ends, or choose another folder")
    except OSError:
        return None
    return file


# ------------------------------------------------------------------------------------------------------------
# worker processes
# ------------------------------------------------------------------------------------------------------------

def count_cores():
    """Those that this process may use: taskset, SLURM and containers can allow fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run_in_workers(function, jobs, workers, bar, done):
    """Call function(*job) for each job in `workers` processes; here done(job, result) as they finish.

    jobs may be a generator: it is asked for one job more than there are workers. The bar moves as the
    function calls count_events. The first error, or Ctrl-C, ends all processes.
    """
    context = multiprocessing.get_context("spawn")  # fork is not safe once pyarrow has threads
    counter, before = context.Value("q", 0), bar.n
    jobs, running = iter(jobs), {}
    with noting_ctrl_c() as caught, ProcessPoolExecutor(workers, context, start_worker, (counter,)) as pool:
        try:
            while True:
                for job in islice(jobs, workers + 1 - len(running)):  # one waits, so that no worker has to
                    with holding_back_ctrl_c():
                        running[pool.submit(function, *job)] = job
                if not running:
                    return
                for future in wait(running, timeout=0.5, return_when=FIRST_COMPLETED).done:
                    done(running.pop(future), future.result())
                bar.update(before + counter.value - bar.n)
                if caught:
                    raise KeyboardInterrupt
        except BaseException as error:
            for worker in multiprocessing.active_children():
                worker.terminate()
            if isinstance(error, BrokenProcessPool):
                fail("a worker was killed, perhaps for lack of memory; the same command goes on, try fewer "
                     "--workers")
            raise


@contextmanager
def noting_ctrl_c():
    """-> list that Ctrl-C only adds to: raised inside wait() it could lock the pool for ever."""
    caught = []
    before = signal.signal(signal.SIGINT, lambda *_: caught.append(True))
    try:
        yield caught
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def holding_back_ctrl_c():
    """Processes started in here never see Ctrl-C, which a terminal sends to all; this one sees it after."""
    if hasattr(signal, "pthread_sigmask"):  # not on Windows
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        if hasattr(signal, "pthread_sigmask"):
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def start_worker(counter):
    """Count events where the main process sees it, and end when that does, even if it was killed."""
    global n_counted
    n_counted = counter
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def count_events(n):
    with n_counted.get_lock():
        n_counted.value += n


# ------------------------------------------------------------------------------------------------------------
# devices and ranks
# ------------------------------------------------------------------------------------------------------------

def start_process(config):
    """Choose device and precision, join torchrun's process group -> what this process is:

    rank, world_size, is_main (rank 0), device, dtype, why_dtype (in words), autocast (a context for forward
    passes). All ranks follow rank 0's choice of dtype: their machines may differ.
    """
    import torch
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    name = config.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        fail("device = 'cuda': torch sees no CUDA GPU here; use --device=auto or install a CUDA build of "
             "torch")
    if name == "mps" and not torch.backends.mps.is_available():
        fail("device = 'mps': torch sees no Apple GPU here; use --device=auto")
    if name == "cuda":
        local_rank = int(os.environ.get("LOCAL_RANK", 0))
        if local_rank >= torch.cuda.device_count():
            fail(f"rank {rank} has no GPU of its own: {torch.cuda.device_count()} on this machine, "
                 "lower --nproc_per_node")
        torch.cuda.set_device(local_rank)
        name = f"cuda:{local_rank}"
    device = torch.device(name)
    dtype, why_dtype = choose_dtype(config.dtype, device)
    if world_size > 1:
        # Ranks that torchrun starts again (--max_restarts) get the old store. There they may find the
        # addresses of those that died (torch 2.13), hence a prefix for each attempt. On several machines the
        # number of the attempt may differ; sample_config/slurm.sh has another way there.
        store, _, _ = next(torch.distributed.rendezvous("env://"))
        one_node = os.environ.get("GROUP_WORLD_SIZE", "1") == "1"
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", 0) if one_node else 0
        store = torch.distributed.PrefixStore(f"attempt_{attempt}", store)
        # gloo adds up numbers on the CPU without waiting for the GPU, nccl the gradients
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        torch.distributed.init_process_group(backend, rank=rank, world_size=world_size, store=store)
        groups_of_ranks.append(torch.distributed.group.WORLD)
        if rank == 0:
            store.set("dtype", f"{dtype}|{why_dtype}")
        dtype, _, why_dtype = store.get("dtype").decode().partition("|")
    dtype = getattr(torch, dtype)
    if device.type == "cuda":
        # TF32 makes float32 runs fast. In other runs only the embedding is float32, and there it would round
        # times by up to 4 ns.
        torch.backends.cuda.matmul.fp32_precision = "tf32" if dtype == torch.float32 else "ieee"
        # torch prefers cuDNN's attention where there is a mask. It plans each new shape for a second, and has
        # NaN gradients at 64 tokens (torch 2.13, pytorch issue 196678).
        torch.backends.cuda.enable_cudnn_sdp(False)
    autocast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
    return SimpleNamespace(rank=rank, world_size=world_size, is_main=rank == 0, device=device, dtype=dtype,
                           why_dtype=why_dtype, autocast=autocast)


def choose_dtype(name, device):
    """"auto": bfloat16 where the hardware multiplies in it, else float32 (old CUDA: float16) -> name, why."""
    import torch
    if name != "auto":
        return name, "as asked for"
    if device.type == "cuda":
        has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        return ("bfloat16", "fast on this GPU") if has_bf16 else ("float16", "this GPU has no bfloat16")
    if device.type == "cpu" and torch.cpu._is_amx_tile_supported():
        return "bfloat16", "this CPU has AMX"
    if device.type == "cpu" and torch.cpu._is_avx512_bf16_supported():
        return "bfloat16", "this CPU has AVX512-BF16"
    return "float32", "no bfloat16 hardware"


def stop_process(process):
    import torch
    if process.world_size > 1:
        torch.distributed.destroy_process_group()


def wait_for_all(process):
    import torch
    if process.world_size > 1:
        torch.distributed.barrier()


def share_of_rank(n, process):
    """Which of n things this rank works on: neighbours, about as many on each rank."""
    return np.array_split(np.arange(n), process.world_size)[process.rank]


def sum_over_ranks(values, process):
    """Add up numbers, or a 1-d tensor, over all ranks -> list of floats; waits for a GPU's tensor only."""
    import torch
    total = torch.as_tensor(values)
    total = total.to(torch.float32 if total.device.type == "mps" else torch.float64)  # mps has no float64
    if process.world_size > 1:
        torch.distributed.all_reduce(total)
    return total.tolist()


def gather_arrays(arrays, process):
    """Stack the arrays of all ranks in their order. arrays: dict of (n_i, ...), {} on a rank without any."""
    import torch
    if process.world_size == 1:
        return arrays
    gathered = [None] * process.world_size
    torch.distributed.all_gather_object(gathered, arrays)
    parts = [part for part in gathered if part]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def suited_micro_batch_size(process, max_pulses, config):
    """micro_batch_size where the knob is 0: what a GPU's memory holds, what stays in a CPU's cache.

    For the backward pass the base model keeps about 0.1 MB per token, another one in proportion to its layers
    and width.
    """
    if process.device.type != "cuda":
        return min(max(8192 // config.embedding_dim, 16), 128)
    import torch
    bytes_per_token = 1e5 * config.num_layers / 8 * config.embedding_dim / 256
    memory = 0.6 * torch.cuda.get_device_properties(process.device).total_memory
    return int(min(max(memory / bytes_per_token / (max_pulses + 1), 1), 1024))


def count_parameters(weights):
    """Of a state_dict, in which the DOMs' positions are no parameters."""
    return sum(weight.numel() for name, weight in weights.items() if not name.endswith("geometry"))


# ------------------------------------------------------------------------------------------------------------
# what both training loops share
# ------------------------------------------------------------------------------------------------------------

def check_flash(raw_model, process):
    """On a GPU, compare flash attention with the plain one before it is trusted with a long run."""
    import torch
    mixer = raw_model.encoder.backbone.blocks[0].mixer
    is_used = process.device.type == "cuda" and process.dtype != torch.float32
    if is_used and getattr(mixer, "can_flash", False):
        error = flash_error(mixer, process.device, process.dtype)
        if not error < 0.05:
            fail(f"flash attention differs from the plain one by {error:.2g} of its largest number on this "
                 "GPU; use --dtype=float32, which does without, or another version of torch")


def flash_error(mixer, device, dtype):
    """How far flash attention is off on made-up events, relative to the largest number."""
    import torch
    import model
    starts = torch.tensor([0, 1, 3, 40, 168], dtype=torch.int32, device=device)
    packing = model.Packing(starts, 128, 168)
    rng = torch.Generator(device).manual_seed(0)
    shape = (168, 3, mixer.num_heads, mixer.qkv.in_features // mixer.num_heads)
    qkv = torch.randn(shape, generator=rng, device=device, dtype=dtype).requires_grad_()
    found = []
    for attend in (model.flash_attention, model.rectangle_attention):
        x = attend(qkv, packing, mixer.scale).float()
        gradient, = torch.autograd.grad(x.square().sum(), qkv)
        found.append((x.detach(), gradient.float()))
    return max(((a - b).abs().max() / b.abs().max()).item() for a, b in zip(*found))


def compiled_and_distributed(raw_model, config, process):
    """The model as the loop calls it. What is saved and evaluated is raw_model, whose weights it shares."""
    import torch
    check_flash(raw_model, process)
    model = raw_model
    if config.compile:
        if process.is_main:
            print("torch.compile: the first step takes about a minute", flush=True)
        warnings.filterwarnings("ignore", "TensorFloat32 tensor cores")  # start_process says why not
        model = torch.compile(raw_model, dynamic=True)
    if process.world_size == 1:
        return model
    # DDP goes around the compiled model; else it would cut its graph, and compile anew for each new length
    torch._dynamo.config.optimize_ddp = False
    return torch.nn.parallel.DistributedDataParallel(model, broadcast_buffers=False,
                                                     gradient_as_bucket_view=True)


def summing_gradients(model, process, is_last):
    """A context for the micro-batches of a step: gradients are summed over ranks with the last one only."""
    return nullcontext() if process.world_size == 1 or is_last else model.no_sync()


def evaluation_line(row, config):
    """What an evaluation has found, from a row of log.csv."""
    found = " ".join(f"{name} {value:.4g}" for name, value in row.items() if name.startswith("val_"))
    return f"eval {row['step']:6d}/{config.max_steps} | {found}"


def step_line(row, config):
    """What a step was like, from a row of log.csv."""
    losses = " ".join(f"{name.removesuffix('_loss')} {value:.4f}" for name, value in row.items()
                      if name.endswith("loss") and not name.startswith("val_"))
    line = (f"step {row['step']:6d}/{config.max_steps} | {losses} | norm {row['grad_norm']:.2f} | "
            f"lr {row['lr']:.1e} | {config.batch_size / row['events_per_s'] * 1e3:.1f} ms, "
            f"data {row['data_ms']:.1f} | {row['events_per_s']:,.0f} events/s")
    return line + (f" | {row['bad_steps']} steps skipped" if row["bad_steps"] else "")


class Speedometer:
    """Events/s, and how long a step waits for its events, since the last reading; pauses do not count."""

    def __init__(self, batch_size):
        self.batch_size = batch_size
        self.start()

    def start(self):
        self.begin, self.n_steps, self.waited = time.perf_counter(), 0, 0.0

    @contextmanager
    def pause(self):
        begin = time.perf_counter()
        yield
        self.begin += time.perf_counter() - begin

    def next_step(self, loader):
        begin = time.perf_counter()
        batches = next(loader)
        self.waited += time.perf_counter() - begin
        self.n_steps += 1
        return batches

    def read(self):
        """-> columns of log.csv; starts anew."""
        seconds = (time.perf_counter() - self.begin) / self.n_steps
        columns = {"events_per_s": self.batch_size / seconds, "data_ms": self.waited / self.n_steps * 1e3}
        self.start()
        return columns


# ------------------------------------------------------------------------------------------------------------
# stopping a run
# ------------------------------------------------------------------------------------------------------------

def catch_signals():
    """From now on Ctrl-C and SIGTERM (SLURM's warning) only add to a list -> this list.

    The second Ctrl-C ends the process at once.
    """
    caught = []

    def note(number, frame):
        if number == signal.SIGINT and number in caught:
            raise KeyboardInterrupt
        caught.append(number)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, note)
    return caught


def release_signals():
    """Ctrl-C and SIGTERM end the process at once again: after the training loop nothing can be lost."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)


def end_stopped_run(config, caught, step, process):
    """Once the checkpoint is written: exit 130 after Ctrl-C, as a shell expects, 0 after SIGTERM."""
    wait_for_all(process)
    if process.is_main:
        print(f"stopped at step {step}, saved in {config.out_dir}/ckpt.pt; the same command goes on from "
              "there", flush=True)
    stop_process(process)
    raise SystemExit(130 if signal.SIGINT in caught else 0)


def stop_bad_run(config, step, losses, batches, process):
    """More steps in a row than max_bad_steps had a gradient that is not finite: name the events and exit.

    losses: tensors (B,), one for each micro-batch of this rank's share of the step.
    A loss that is not finite for some events only is a fault of these; otherwise the run has diverged.
    """
    found = gather_arrays({"loss": np.concatenate([loss.float().cpu().numpy() for loss in losses]),
                           "event_id": np.concatenate([batch["event_id"] for batch in batches])}, process)
    losses, event_ids = found["loss"], found["event_id"]
    bad = event_ids[~np.isfinite(losses)]
    what = (f"the loss is not finite for {len(bad)} of its events" if len(bad) else "all its events have a "
            "finite loss")
    some = ", ".join(map(str, (bad if len(bad) else event_ids)[:10].tolist()))
    fail(f"step {step}: the gradient was not finite in more than max_bad_steps = {config.max_bad_steps} "
         f"steps in a row, which were skipped; {what}: event_id {some}{', ...' if len(bad) > 10 else ''}. "
         f"Look at these events in {config.data_dir}, or start another run with a smaller learning_rate in "
         f"another out_dir; {config.out_dir} keeps its last checkpoint",
         SystemExit if 0 < len(bad) < len(losses) else Diverged)


def check_val_loss(config, step, val_loss):
    if not math.isfinite(val_loss):
        fail(f"step {step}: val_loss is {val_loss}; {config.out_dir} keeps the last good checkpoint; "
             "start another run with a smaller learning_rate in another out_dir", Diverged)


# ------------------------------------------------------------------------------------------------------------
# checkpoints and log.csv
# ------------------------------------------------------------------------------------------------------------

def save_checkpoint(path, **content):
    """Write a checkpoint of ours; one that holds a NaN is refused, so that the last good one stays."""
    import torch
    if not all(bool(value.isfinite().all()) for value in content["model"].values()):
        fail(f"{path} is left as it was: after {content['step']} steps the model holds NaN or infinite "
             "numbers; go on with dtype = 'float32', or start another run with a smaller learning_rate or "
             "grad_clip in another out_dir", Diverged)

    def write(part):
        with open(part, "wb") as file:  # given a path, torch reports a full disk as something else
            torch.save({"format": CHECKPOINT_FORMAT, **content}, file)
    write_atomic(path, write)


def read_checkpoint(path):
    """Whatever torch.save wrote, on the CPU; one line and exit 1 if the file is missing or damaged."""
    import torch
    if not os.path.isfile(path):
        fail(f"{path}: no such checkpoint; train.py and finetune.py write ckpt.pt and best.pt into their "
             "out_dir")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception:  # whatever torch's unpickler makes of a damaged file, in many words
        fail(f"{path}: not a readable checkpoint; it is damaged or of another program: take another one, or "
             "move its folder away to start anew")


def load_checkpoint(path):
    """A checkpoint of ours as a dict of tensors and plain python values, on the CPU. Refuses all others."""
    checkpoint = read_checkpoint(path)
    if is_published(checkpoint):
        fail(f"{path}: weights of the published PolarBERT code; convert them with: python -m "
             f"tools.import_published --checkpoint={path} --data_dir=... --out=out/published.pt")
    found = checkpoint.get("format") if isinstance(checkpoint, dict) else None
    if found != CHECKPOINT_FORMAT:
        fail(f"{path}: checkpoint format {found}, need {CHECKPOINT_FORMAT}; it was written by another "
             "version or program: check it out, or train anew")
    if not {"model", "config", "step"} <= checkpoint.keys():
        fail(f"{path}: holds only {', '.join(checkpoint)}; it is damaged, remove it")
    return checkpoint


def is_published(checkpoint):
    """Whether it is one of timinar/PolarBERT: a state_dict, or Lightning's file with one inside."""
    state = checkpoint.get("state_dict", checkpoint) if isinstance(checkpoint, dict) else {}
    return any(str(name).endswith("transformer_blocks.0.attention.wq.weight") for name in state)


def check_geometry(saved, geometry, path, data_dir):
    """A run goes on in the detector in which it began. saved: its checkpoint; geometry: its records."""
    if difference := difference_of_detectors(saved, geometry):
        fail(f"{path} was trained on another detector than {data_dir}: {difference}; choose the data_dir it "
             "belongs to")


def difference_of_detectors(saved, geometry):
    """What tells a checkpoint's detector from this one, in words; "" if nothing does."""
    known, position = saved["model"]["encoder.embedding.geometry"].numpy(), geometry["position"]  # (V, 3) [m]
    if len(known) != len(position):
        return f"it has {len(known):,} DOMs, not {len(position):,}"
    apart = np.linalg.norm(known - position, axis=1)
    if not apart.any():
        return ""
    return (f"{np.count_nonzero(apart):,} DOMs lie elsewhere, by {np.median(apart):.1f} m (median) to "
            f"{apart.max():.1f} m")


def weights_for(saved, geometry, path, data_dir, part=""):
    """A checkpoint's weights whose names begin with `part`, for a model of this detector.

    It may be another than the one trained in: an encoder that knows DOMs by their positions alone goes on
    anywhere, and so does dom_head = "position", but for its bias, which begins anew. A table of DOMs, or a
    weight vector per DOM, would give numbers without a meaning.
    """
    import torch
    weights = {name: value for name, value in saved["model"].items() if name.startswith(part)}
    difference = difference_of_detectors(saved, geometry)
    if not difference:
        return weights
    for name, what in (("encoder.embedding.dom_table.weight", "table of DOMs"),
                       ("dom_head.weight", "dom_head = 'linear'")):
        if name in weights:
            fail(f"{path} was trained on another detector than {data_dir}: {difference}; its {what} is of no "
                 "use there. Only use_dom_positions = True without use_dom_table, and dom_head = 'position', "
                 "carry over")
    if is_main_process():
        print(f"note: {path} was trained on another detector than {data_dir}: {difference}; it knows DOMs by "
              "their positions alone and goes on there")
    weights["encoder.embedding.geometry"] = torch.from_numpy(geometry["position"].copy())
    if "dom_head.bias" in weights:
        weights["dom_head.bias"] = torch.zeros(len(geometry))
    return weights


def default_of(field):
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def start_log(config, columns, step):
    """Open out_dir/log.csv for a run that begins at `step`, keep the rows before it -> log(row), to add one.

    Missing columns stay empty, floats get 6 significant digits. With wandb_project each row also goes to
    Weights & Biases.
    """
    path, rows = f"{config.out_dir}/log.csv", []
    if step > 0 and os.path.isfile(path):
        with open(path, newline="") as file:
            rows = [row for row in csv.DictReader(file) if row["step"].isdigit() and int(row["step"]) < step]
    wandb_run = start_wandb(config) if config.wandb_project else None

    def write(part):
        with open(part, "w", newline="") as file:
            writer = csv.DictWriter(file, columns, extrasaction="ignore")
            writer.writeheader()
            writer.writerows(rows)
    write_atomic(path, write)

    def log(row):
        cells = [f"{row[key]:.6g}" if isinstance(row.get(key), float) else row.get(key, "")
                 for key in columns]
        try:
            with open(path, "a", newline="") as file:
                csv.writer(file).writerow(cells)
        except OSError as error:
            fail(f"{path}: cannot be written ({error.strerror}); make room and run the same command again, "
                 "it goes on from ckpt.pt")
        if wandb_run:
            wandb_run.log(row, step=row["step"])
    return log


def start_wandb(config):
    import wandb
    run_id = f"{zlib.crc32(os.path.abspath(config.out_dir).encode()):08x}"  # a run that goes on: one curve
    return wandb.init(project=config.wandb_project, name=config.out_dir, id=run_id, resume="allow",
                      config=dataclasses.asdict(config))
