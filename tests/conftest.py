"""Real files, real scripts: what the tests share."""
import gc
import importlib
import io
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import numpy as np
import pytest
from tqdm import tqdm

tqdm.monitor_interval = 0  # no thread of its own: processes are forked here
os.environ["OMP_NUM_THREADS"] = "1"  # before torch is loaded: here as in the scripts that the tests start
os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"  # compile here, without more processes that load torch
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

TINY_MODEL = ["--embedding_dim=32", "--dom_embed_dim=16", "--num_heads=2", "--hidden_size=64",
              "--num_layers=2"]
TINY_RUN = [*TINY_MODEL, "--batch_size=16", "--micro_batch_size=8", "--max_steps=6", "--val_events=50",
            "--beta2=0.9", "--cooldown_steps=2", "--eval_interval=3", "--log_interval=1", "--save_interval=2",
            "--device=cpu", "--dtype=float32"]


def run(script, *args, launcher=None, **kwargs):
    """Run a script of the project as a user would, from its root -> CompletedProcess with text output.

    Its main() is called in this process, which spares the start of an interpreter that loads torch: 3 s. With
    a launcher, or anything else that needs a process of its own (env, preexec_fn), it gets one. A launcher
    is the beginning of a command, or a function: forked(), forked_ranks(n).
    """
    if callable(launcher):
        return launcher(script, *map(str, args))
    if launcher is None and not kwargs:
        return call_main(script, *map(str, args))
    env = {**os.environ, **kwargs.pop("env", {})}
    program = [str(ROOT / script)]
    if "tools" in str(script):
        program = ["-m", script.removesuffix(".py").replace("/", ".")]
    return subprocess.run([*(launcher or (sys.executable,)), *program, *map(str, args)], cwd=ROOT, env=env,
                          capture_output=True, text=True, timeout=300, **kwargs)


def status_of_main(script, *args):
    """What `python script args` would do, in this process -> its exit status."""
    import common
    module = importlib.import_module(script.removesuffix(".py").replace("/", "."))
    argv, folder = sys.argv, os.getcwd()
    sys.argv = [script, *args]
    os.chdir(ROOT)
    try:
        common.run_stage(module.main)
    except SystemExit as end:  # as the interpreter treats it
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except Exception:
        traceback.print_exc()
        return 1
    finally:
        sys.argv = argv
        os.chdir(folder)
    return 0


def call_main(script, *args):
    """What `python script args` would do, in this process: same output, same exit status."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    out, err = io.StringIO(), io.StringIO()
    try:
        with redirect_stdout(out), redirect_stderr(err):
            status = status_of_main(script, *args)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    if status:
        gc.collect()  # an error's frames may hold the lock of a folder, as no process does that has ended
    return subprocess.CompletedProcess([script, *args], status, out.getvalue(), err.getvalue())


class Fork:
    """A script in a process of its own, group and all, that begins as a copy of this one: torch is loaded.

    On a machine with a GPU it begins anew. As much of subprocess.Popen as the tests need; stderr goes where
    stdout goes. before: called first; output: a file.
    """

    def __init__(self, script, *args, env=(), before=lambda: None, output=None):
        self.output, self.returncode = output or tempfile.TemporaryFile("w+"), None
        torch = sys.modules.get("torch")
        anew = torch and torch.cuda.is_available()  # a copy lacks the threads that autograd has for a GPU
        self.pid = os.fork()
        if self.pid == 0:
            status = 1
            try:
                os.setsid()
                os.environ.update(env)
                signal.signal(signal.SIGINT, signal.default_int_handler)  # pytest-xdist's workers ignore it
                for number in (1, 2):
                    os.dup2(self.output.fileno(), number)
                sys.stdout = sys.stderr = open(1, "w", buffering=1, closefd=False)
                before()
                if anew:
                    os.environ["PYTHONPATH"] = os.pathsep.join(sys.path)
                    main = "import sys, conftest; sys.exit(conftest.status_of_main(*sys.argv[1:]))"
                    os.execv(sys.executable, [sys.executable, "-c", main, script, *map(str, args)])
                status = status_of_main(script, *map(str, args))
                sys.stdout.flush()
            finally:
                os._exit(status)

    def poll(self):
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self.returncode

    def kill(self):
        os.kill(self.pid, signal.SIGKILL)

    def communicate(self, timeout=300):
        end = time.monotonic() + timeout
        while self.poll() is None:
            assert time.monotonic() < end, f"still at work after {timeout} s"
            time.sleep(0.01)
        self.output.seek(0)
        return self.output.read(), None


def forked(**kwargs):
    """A launcher for run: the script in a Fork."""
    def launch(script, *args):
        process = Fork(script, *args, **kwargs)
        output, _ = process.communicate()
        return subprocess.CompletedProcess([script, *args], process.returncode, output, output)
    return launch


def forked_ranks(n):
    """A launcher like torchrun(n), whose ranks are forked: n + 1 interpreters need not load torch."""
    def launch(script, *args):
        import torch
        store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        env = {"WORLD_SIZE": str(n), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port),
               "TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"}
        ranks = [Fork(script, *args, env=env | {"RANK": str(i), "LOCAL_RANK": str(i)}) for i in range(n)]
        while None in (codes := [rank.poll() for rank in ranks]) and not any(codes):
            time.sleep(0.02)
        for rank in ranks:  # as torchrun does: the first that fails ends all
            if rank.poll() is None:
                rank.kill()
        output = "".join(rank.communicate()[0] for rank in ranks)
        status = next((rank.returncode for rank in ranks if rank.returncode), 0)
        return subprocess.CompletedProcess([script, *args], status, output, output)
    return launch


def run_ok(script, *args, **kwargs):
    done = run(script, *args, **kwargs)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def user_error(script, *args, status=1, **kwargs):
    """Run a script that must refuse: exit status, one line of error, no traceback -> that line."""
    done = run(script, *args, **kwargs)
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == status and len(lines) == 1, done.stdout + done.stderr
    assert "Traceback" not in done.stderr, done.stderr
    return lines[0]


def hear_ctrl_c():
    """For preexec_fn: a shell lets what runs in its background ignore Ctrl-C, and processes inherit that."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def kill_when_there_is(pattern, folder, *command):
    """Start a command, SIGKILL it as soon as the folder has such a file -> how many it has then."""
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    while not list(folder.glob(pattern)):
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=30)
    n_found = len(list(folder.glob(pattern)))
    time.sleep(0.5)  # its worker ends with it
    return n_found


@pytest.fixture(scope="session", autouse=True)
def quick_workers():
    """Worker processes come from a server that has loaded what they need, which spares each of them 1 s.

    Scripts in processes of their own start their workers anew, as users' do.
    """
    get_context = multiprocessing.get_context
    modules = ["pytest", "prepare", "simulate", "tools.prometheus", "tools.graphnet"]
    get_context("forkserver").set_forkserver_preload(modules)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(multiprocessing, "get_context", lambda method=None: get_context(
            "forkserver" if method == "spawn" else method))
        yield


def torchrun(n):
    return (sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={n}")


@pytest.fixture(scope="session")
def demo_data(tmp_path_factory):
    """A data folder that went the whole way: simulated, written as parquet, prepared.

    300 events in pretrain, 150 in finetune, 103 in val, 40 in test.
    """
    folder = tmp_path_factory.mktemp("demo")
    run_ok("simulate.py", f"--out_dir={folder}/raw", "--n_events=553", "--events_per_batch=150",
           "--n_test_events=40", "--workers=1")
    run_ok("prepare.py", f"--input_dir={folder}/raw", f"--data_dir={folder}/demo", "--workers=1",
           "--splits={'pretrain': (1, 2), 'finetune': (3, 3), 'val': (4, 4), 'test': 'test'}")
    return folder / "demo"


@pytest.fixture(scope="session")
def pretrained(demo_data, tmp_path_factory):
    """A tiny pretraining run that was never stopped; tests only read it."""
    out_dir = tmp_path_factory.mktemp("pretrained")
    done = run_ok("train.py", f"--data_dir={demo_data}", f"--out_dir={out_dir}", *TINY_RUN)
    return out_dir, done


def random_events(rng, lengths, n_doms=5160):
    """Made-up EVENT and PULSE records with the given numbers of pulses, one event after another."""
    import data
    lengths = np.asarray(lengths)
    events, pulses = np.zeros(len(lengths), data.EVENT), np.zeros(lengths.sum(), data.PULSE)
    events["length"], events["n_pulses"], events["start"] = lengths, lengths, np.cumsum(lengths) - lengths
    events["event_id"] = np.arange(len(lengths)) * 3 + 1
    events["total_charge"] = rng.uniform(10, 1000, len(lengths))
    events["azimuth"] = rng.uniform(0, 6.28, len(lengths))
    events["zenith"] = rng.uniform(0, 3.14, len(lengths))
    pulses["time"], pulses["charge"] = rng.uniform(6e3, 2e4, len(pulses)), rng.uniform(0.1, 5, len(pulses))
    pulses["dom"], pulses["aux"] = rng.integers(0, n_doms, len(pulses)), rng.random(len(pulses)) < 0.5
    motion = np.random.default_rng(1).standard_normal((len(lengths), 3))  # leaves rng as it was
    events["motion"] = motion / np.linalg.norm(motion, axis=1, keepdims=True)
    return events, pulses


def random_geometry(n_doms=5160):
    """Made-up GEOMETRY records, strings of 60 DOMs."""
    import data
    geometry = np.zeros(n_doms, data.GEOMETRY)
    geometry["position"] = np.random.default_rng(0).uniform(-500, 500, (n_doms, 3))
    geometry["string"] = np.arange(n_doms) // 60
    return geometry


def write_folder(path, **splits):
    """A finished data folder from (events, pulses) of each split, and a made-up geometry."""
    import data
    import prepare
    path.mkdir(parents=True, exist_ok=True)
    random_geometry().tofile(path / "geometry.bin")
    for name, (events, pulses) in splits.items():
        for kind, records in (("events", events), ("pulses", pulses)):
            prepare.reserve(path / f"{name}_{kind}.bin", records.nbytes)
            prepare.write_records(path / f"{name}_{kind}.bin", 0, records)
    counts = {name: {"n_events": len(events), "n_pulses": len(pulses)}
              for name, (events, pulses) in splits.items()}
    (path / "meta.json").write_text(json.dumps({"format": data.FORMAT_VERSION,
                                                "dtypes": data.describe_dtypes(), "max_pulses": 127,
                                                "n_doms": 5160,
                                                "splits": counts}))
    return path
