"""What the stages share. torch is imported late: simulate.py runs without it."""
import ast
import atexit
import csv
import dataclasses
import difflib
import inspect
import json
import math
import multiprocessing
import os
import re
import signal
import sys
import threading
import time
import weakref
import zipfile
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Literal, get_args

# torch reads them when it loads: else 4 times slower on a shared machine; huge pages, 1.15 times
os.environ |= {"OMP_WAIT_POLICY": "PASSIVE", "THP_MEM_ALLOC_ENABLE": "1"} | os.environ
from tqdm import tqdm

RANK = int(os.environ.get("RANK", 0))
WORLD_SIZE = int(os.environ.get("WORLD_SIZE", 1)) if "RANK" in os.environ else 1
CHECKPOINT_FORMAT = 3
Device = Literal["auto", "cuda", "mps", "cpu"]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]
tqdm.set_lock(threading.RLock())  # the default leaks a semaphore
locks = weakref.WeakSet()  # files that lock_folder holds
groups = []  # if DDP frees the group last, teardown deadlocks

def fail(message: str, status: int = 1):
    """Print one line to stderr and end."""
    tqdm.write(f"error: {f'rank {RANK}: ' * (WORLD_SIZE > 1)}{message}", file=sys.stderr)
    (os._exit if groups else sys.exit)(status)  # see run_main

def print0(text: str):
    if RANK == 0:
        print(text, flush=True)  # at once in a redirected log too

def run_main(main):
    """Call main(). Ctrl-C, a failed read and a full memory end in one line."""
    try:
        status = main()
    except KeyboardInterrupt:
        print0("\nstopped; the same command resumes")
        os._exit(130)  # python's queue thread would complain
    except OSError as error:
        fail(str(error))
    except (MemoryError, RuntimeError) as error:  # torch's is a RuntimeError
        if isinstance(error, RuntimeError) and not re.search("(of|ate|enough) memory", str(error)):
            raise
        fail(f"out of memory; lower micro_batch_size or workers ({str(error)[:80]})")
    if groups:  # python's own exit may abort, pytorch issue 190489
        import torch
        torch.distributed.destroy_process_group()
        atexit._run_exitfuncs()
        os._exit(status or 0)
    raise SystemExit(status)

# ---- config: python files and --key=value, left to right, later wins ----------------------------

def load_config(cls, doc: str = "", args: list | None = None):
    """Build a `cls` from the command line or `args`; config.given: what was set."""
    types = {field.name: field.type for field in dataclasses.fields(cls)}
    defaults, values, files = vars(cls()), {}, []
    for arg in sys.argv[1:] if args is None else args:
        if arg in ("-h", "--help"):
            print(help_text(cls, doc))
            raise SystemExit
        key, equals, text = arg.removeprefix("--").partition("=")
        assignments = {key: text}
        if arg.startswith("-") and not equals:
            fail(f"{arg}: options are written --key=value; --help lists them")
        try:
            if not arg.startswith("-"):
                exec(Path(arg).read_text(encoding="utf-8"), {}, assignments := {})
                files.append(Path(arg).stem)
            elif types.get(key) in (int, float, bool, dict):
                assignments = {key: ast.literal_eval(text)}
        except Exception as error:  # whatever the user's expressions raise
            fail(f"{arg}: {type(error).__name__}: {error}")
        for key, value in assignments.items():
            if key not in types:
                near = difflib.get_close_matches(key, types, n=1, cutoff=0.5) or ["--help"]
                fail(f"{arg}: no option {key}; did you mean {near[0]}?")
            values[key] = to_type(key, value, types[key], arg)
    config = cls(**values)
    config.given = set(values)
    if getattr(config, "out_dir", None) == "":
        config.out_dir = "out/" + ("+".join(files) or Path(sys.argv[0]).stem)
    changed = [f"{k} = {x!r:.99}" for k, x in vars(config).items()
               if defaults.get(k, x) != x]
    print0(f"options: {', '.join(changed) or 'the defaults'}")
    return config

def to_type(key, value, kind, where):
    """Return the value as the type of its field; refuse nonsense."""
    if {kind, type(value)} == {int, float} and value % 1 == 0:
        value = kind(value)  # 1e6
    if get_args(kind) and value not in get_args(kind):  # a Literal
        fail(f"{where}: {key} = {value!r}: choose one of {', '.join(get_args(kind))}")
    if not get_args(kind) and type(value) is not kind:
        fail(f"{where}: {key} = {value!r} is not of type {kind.__name__}")
    if kind in (int, float) and not 0 <= value < math.inf:
        fail(f"{where}: {key} = {value!r} must be 0 or more, and finite")
    if key in ("beta1", "beta2", "mask_prob") and not 0 < value < 1:
        fail(f"{where}: {key} = {value!r} must be between 0 and 1")
    return value

def help_text(cls, doc):
    """Return the docstring, and the options with their comments."""
    source = "".join(inspect.getsource(base) for base in cls.__mro__[:-1])
    comments = dict(re.findall(r"^    (\w+): [^#\n]*#\s*(.*)", source, re.M))
    lines = [doc.strip(), "", "options, in config files or as --key=value:"]
    for field, value in zip(dataclasses.fields(cls), vars(cls()).values()):
        text = " | ".join([comments.get(field.name, ""), *get_args(field.type)])
        lines.append(f"  {f'--{field.name}={value!r}':<34} {text}")
    return "\n".join(lines)

# ---- files and worker processes -----------------------------------------------------------------

def write_atomic(path, write):
    """Call write(part) on rank 0, then rename: a file is the old one or whole."""
    if RANK > 0:
        return
    for lock in locks:
        inode = os.stat(lock.name).st_ino if os.path.exists(lock.name) else 0
        if inode != os.fstat(lock.fileno()).st_ino:
            fail(f"{lock.name}: removed while this run used it")
    part = Path(f"{path}.{os.getpid()}.part")
    try:
        part.parent.mkdir(parents=True, exist_ok=True)
        write(part)
        with open(part, "r+b") as file:
            os.fsync(file.fileno())  # bytes before the name: power may fail
        os.replace(part, path)
    except (OSError, RuntimeError) as error:  # RuntimeError: a full disk
        part.unlink(missing_ok=True)
        fail(f"{path}: cannot be written ({error}); the file that was there is untouched")

def write_json(path, content):
    write_atomic(path, lambda part: part.write_text(json.dumps(content, indent=1) + "\n"))

def lock_folder(folder):
    """Keep other runs out of a folder as long as the returned file is open."""
    if RANK > 0:
        return None
    os.makedirs(folder, exist_ok=True)
    file = open(f"{folder}/.lock", "w")
    locks.add(file)
    try:
        import fcntl
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        fail(f"{folder}: another run uses it; wait for its end, or choose another folder")
    except (ImportError, OSError):
        pass  # Windows, some network disks
    for part in Path(folder).glob("*.part"):
        part.unlink()  # of a killed run
    return file

def run_in_workers(function, jobs, workers, done):
    """Call function(*job) in `workers` processes, and done(result) here."""
    # a job must be small: python 3.11.2 hangs at Ctrl-C if one fills the pipe
    if hasattr(os, "sched_getaffinity"):  # taskset and SLURM may allow fewer cores
        workers = workers or len(os.sched_getaffinity(0))
    context = multiprocessing.get_context("spawn")  # fork is not safe with pyarrow
    pool = ProcessPoolExecutor(workers or os.cpu_count(), context, start_worker)
    if hasattr(signal, "pthread_sigmask"):  # workers inherit that Ctrl-C is blocked
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    futures = [pool.submit(function, *job) for job in jobs]
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    try:
        for future in as_completed(futures):
            done(future.result())
    except BaseException as error:
        pool.shutdown(wait=False, cancel_futures=True)
        for worker in multiprocessing.active_children():
            worker.terminate()
        if isinstance(error, BrokenExecutor):
            fail("a worker was killed, perhaps out of memory; resume with fewer --workers")
        raise
    pool.shutdown()

def start_worker():
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()

# ---- devices and ranks --------------------------------------------------------------------------

def init_distributed(config):
    """Choose device and precision, join the ranks -> device, dtype, autocast."""
    import torch
    torch.set_flush_denormal(True)  # Muon's momentum of idle units: 2 times slower
    name, dtype = config.device, config.dtype
    if name == "auto":
        name = next(x for x in ("cuda", "mps", "cpu") if getattr(torch, x).is_available())
    if name == "cuda":
        local_rank = int(os.environ.get("LOCAL_RANK", 0))
        if local_rank >= torch.cuda.device_count():
            fail(f"device = 'cuda': torch sees {torch.cuda.device_count()} GPUs")
        name = f"cuda:{local_rank}"
        torch.cuda.set_device(local_rank)
        torch.backends.cuda.enable_cudnn_sdp(False)  # NaN gradients, pytorch issue 196678
    device = torch.device(name)
    if WORLD_SIZE > 1:
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"  # gloo: numbers
        # restarted ranks must not find the addresses of those that died (one machine)
        store, *_ = next(torch.distributed.rendezvous("env://"))
        if os.environ.get("GROUP_WORLD_SIZE", "1") == "1":
            attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)
            store = torch.distributed.PrefixStore(f"attempt_{attempt}", store)
        torch.distributed.init_process_group(backend, None, None, WORLD_SIZE, RANK, store)
        groups.append(torch.distributed.group.WORLD)
    if dtype == "auto":  # bfloat16 where the hardware multiplies in it
        has_bf16 = torch.cuda.is_bf16_supported(False) if device.type == "cuda" else \
            device.type == "cpu" and torch.cpu._is_avx512_bf16_supported()
        dtype = "bfloat16" if has_bf16 else "float16" if device.type == "cuda" else "float32"
    dtype = getattr(torch, dtype)
    if device.type == "cuda":  # only the embedding is float32; TF32 rounds times
        torch.backends.cuda.matmul.fp32_precision = "tf32" if dtype == torch.float32 else "ieee"
    return device, dtype, torch.autocast(device.type, dtype, enabled=dtype != torch.float32)

def all_reduce_sum(values) -> list:
    """Sum numbers or a tensor (n,) over all ranks. Waits for its GPU."""
    import torch
    total = torch.as_tensor(values).cpu().double()
    if WORLD_SIZE > 1:
        torch.distributed.all_reduce(total)
    return total.tolist()

# ---- checkpoints and log.csv --------------------------------------------------------------------

def load_checkpoint(path) -> dict:
    """Read a checkpoint onto the CPU."""
    import torch
    try:
        if zipfile.ZipFile(path).testzip():  # torch checks no checksum
            raise ValueError
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:  # see run_main
        raise
    except Exception:  # whatever torch's unpickler makes of it
        fail(f"{path}: damaged, or not a checkpoint; move it away to start over")
    if not isinstance(checkpoint, dict) or checkpoint.get("format") != CHECKPOINT_FORMAT:
        fail(f"{path}: not of this version; for published weights see tools/import_published.py")
    return checkpoint

def match_options(config, checkpoint, model_class, data_id, path, resume):
    """Take the model's options from a checkpoint."""
    continues = resume or getattr(config, "init_optimizer", False)
    fixed = [*vars(model_class()), *["optimizer", "batch_size"] * continues]
    fixed += ["task", "head_hidden_size"] * resume
    for name, value in (vars(type(config)()) | checkpoint["config"]).items():
        now = getattr(config, name, value)
        if now != value and name in fixed:
            if name in config.given:
                fail(f"{name} = {now!r}, but {path} has {value!r}; use that, or start a new run")
            setattr(config, name, value)
        elif now != value and continues and name != "micro_batch_size":
            print0(f"resume: {name} was {value!r}, now it is {now!r}")
            if name.startswith(("lambda_", "mask_unit", "direction_loss", "val_events")):
                checkpoint["best_val_loss"] = math.inf  # of another loss
    if resume and data_id != checkpoint["data"]:
        fail(f"{path}: of other data or checkpoint; restore them, or use another out_dir")
    if data_id["rule"] != checkpoint["data"]["rule"]:
        print0(f"warning: {path}: rule {checkpoint['data']['rule']}, not {data_id['rule']}")

def start_log(config, start_step):
    """Write config.json, keep log.csv's rows up to start_step -> log(row)."""
    text = json.dumps(dataclasses.asdict(config), indent=1)
    write_atomic(f"{config.out_dir}/config.json", lambda part: part.write_text(text))
    warmup = config.warmup_steps or round(1 / (1 - config.beta2))
    if warmup + config.cooldown_steps * (config.schedule == "trapezoidal") > config.max_steps:
        print0(f"warning: {warmup} warm-up steps and the cooldown exceed max_steps")
    path, rows, wandb = Path(config.out_dir) / "log.csv", [], None
    if path.exists():
        rows = [row for row in csv.DictReader(path.open()) if int(row["step"]) <= start_step > 0]
    if config.wandb_project and RANK == 0:
        import wandb
        wandb.init(project=config.wandb_project, group=config.out_dir, config=json.loads(text))
    begin = time.perf_counter() - float(rows[-1].get("seconds") or 0 if rows else 0)
    def log(row):
        row["seconds"] = round(time.perf_counter() - begin, 1)
        text = {name: f"{x:.6g}" if isinstance(x, float) else x for name, x in row.items()}
        rows.append((rows.pop() if rows and rows[-1]["step"] == str(row["step"]) else {}) | text)
        columns = dict.fromkeys(name for row in rows for name in row)
        lines = [",".join(str(row.get(name, "")) for name in columns) for row in rows]
        lines = "\n".join([",".join(columns), *lines, ""])
        write_atomic(path, lambda part: part.write_text(lines))
        if wandb:
            wandb.log(row, step=row["step"])
    return log

