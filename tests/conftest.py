"""Real files, real scripts: what the tests share."""
import gc
import importlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import traceback
import zlib
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import numpy as np
import pytest

os.environ["OMP_NUM_THREADS"] = "1"  # before torch loads, here and in the scripts that tests start
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

TINY_MODEL = ["--embedding_dim=32", "--dom_embed_dim=16", "--num_heads=2", "--hidden_size=64",
              "--num_layers=2"]
TINY_RUN = [*TINY_MODEL, "--batch_size=16", "--micro_batch_size=8", "--max_steps=6",
            "--val_events=50", "--beta2=0.9", "--warmup_steps=0", "--cooldown_steps=2",
            "--eval_interval=3", "--log_interval=1", "--save_interval=2", "--device=cpu",
            "--dtype=float32"]

def command(script, *args, launcher=(sys.executable,)):
    """Return the command that runs a script of the project as a user would."""
    program = [str(ROOT / script)]
    if str(script).startswith("tools"):
        program = ["-m", str(script).removesuffix(".py").replace("/", ".")]
    return [*map(str, (*launcher, *program, *args))]

def torchrun(n, *options):
    return (sys.executable, "-m", "torch.distributed.run", "--standalone",
            f"--nproc_per_node={n}", *options)

def start(script, *args, launcher=(sys.executable,), **kwargs):
    """Start a script in a process group of its own -> Popen; stderr goes where stdout goes."""
    kwargs.setdefault("stdout", subprocess.PIPE)
    hear_ctrl_c = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # xdist's workers ignore it
    return subprocess.Popen(command(script, *args, launcher=launcher), cwd=ROOT, text=True,
                            stderr=subprocess.STDOUT, start_new_session=True,
                            preexec_fn=hear_ctrl_c, **kwargs)

def run(script, *args, launcher=(sys.executable,), env=None, **kwargs):
    """Run a script in a process -> CompletedProcess with text output."""
    return subprocess.run(command(script, *args, launcher=launcher), cwd=ROOT, text=True,
                          capture_output=True, timeout=200, env={**os.environ, **(env or {})},
                          **kwargs)

def call(script, *args):
    """Call a script's main() in this process: same output, same exit status as run()."""
    import utils
    module = importlib.import_module(script.removesuffix(".py").replace("/", "."))
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    argv, folder, out, err = sys.argv, os.getcwd(), io.StringIO(), io.StringIO()
    sys.argv = [script, *map(str, args)]
    os.chdir(ROOT)
    try:
        with redirect_stdout(out), redirect_stderr(err):
            utils.run_main(module.main)
    except SystemExit as end:
        status = end.code or 0
    except Exception:
        status = 1
        err.write(traceback.format_exc())
    finally:
        sys.argv = argv
        os.chdir(folder)
        for number, handler in handlers.items():
            signal.signal(number, handler)
    gc.collect()  # an error's frames may hold the lock of a folder
    return subprocess.CompletedProcess([script, *args], status, out.getvalue(), err.getvalue())

def run_ok(script, *args, how=call, **kwargs):
    done = how(script, *args, **kwargs)
    assert done.returncode == 0, done.stdout + done.stderr
    return done

def user_error(script, *args, status=1, how=call, **kwargs):
    """Run a script that must refuse: exit status, one line of error, no traceback -> that line."""
    done = how(script, *args, **kwargs)
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == status and len(lines) == 1, done.stdout + done.stderr
    assert "Traceback" not in done.stderr, done.stderr
    return lines[0]

def wait_until(condition, process, seconds=60):
    """Wait until condition() holds while the process lives."""
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < end, "it takes too long"
        time.sleep(0.01)

@pytest.fixture(scope="session")
def demo_data(tmp_path_factory):
    """A data folder that went the whole way: simulated, written as parquet, prepared.

    300 events in pretrain and copy, 150 in finetune and tuned_copy, 103 in val, 40 in test.
    """
    folder = tmp_path_factory.mktemp("demo")
    run_ok("simulate.py", f"--out_dir={folder}/raw", "--n_events=553", "--events_per_batch=150",
           "--n_test_events=40", "--workers=1")
    run_ok("prepare.py", f"--input_dir={folder}/raw", f"--data_dir={folder}/demo", "--workers=1",
           "--splits={'pretrain': (1, 2), 'finetune': (3, 3), 'val': (4, 4), 'test': 'test'}")
    import data
    meta = json.loads((folder / "demo/meta.json").read_text())
    for name, copy in (("pretrain", "copy"), ("finetune", "tuned_copy")):
        meta["splits"][copy] = meta["splits"][name]
        for kind in ("events.bin", "pulses.bin"):
            shutil.copy(folder / f"demo/{name}_{kind}", folder / f"demo/{copy}_{kind}")
    meta["fingerprint"] = data.fingerprint(meta)
    (folder / "demo/meta.json").write_text(json.dumps(meta))
    return folder / "demo"

@pytest.fixture(scope="session")
def pretrained(demo_data, tmp_path_factory):
    """The folder of a tiny pretraining run; tests only read it."""
    out_dir = tmp_path_factory.mktemp("pretrained")
    run_ok("train.py", f"--data_dir={demo_data}", f"--out_dir={out_dir}", *TINY_RUN)
    return out_dir

@pytest.fixture(scope="session")
def finetuned(demo_data, pretrained, tmp_path_factory):
    """The folder of a tiny fine-tuning run; tests only read it."""
    out_dir = tmp_path_factory.mktemp("finetuned")
    run_ok("finetune.py", f"--data_dir={demo_data}", f"--out_dir={out_dir}", *TINY_RUN,
           f"--pretrained={pretrained}/ckpt.pt", "--direction_loss=vmf", "--head_hidden_size=32")
    return out_dir

def random_events(rng, lengths, n_doms=5160):
    """Make up EVENT and PULSE records with these numbers of pulses, one event after another."""
    import data
    lengths = np.asarray(lengths)
    events, pulses = np.zeros(len(lengths), data.EVENT), np.zeros(lengths.sum(), data.PULSE)
    events["length"], events["n_pulses"] = lengths, lengths
    events["start"] = np.cumsum(lengths) - lengths
    events["event_id"] = np.arange(len(lengths)) * 3 + 1
    events["total_charge"] = rng.uniform(10, 1000, len(lengths))
    events["azimuth"] = rng.uniform(0, 6.28, len(lengths))
    events["zenith"] = rng.uniform(0, 3.14, len(lengths))
    event = np.repeat(np.arange(len(lengths)), lengths)
    time = rng.uniform(6e3, 2e4, len(pulses))
    pulses["time"] = time[np.lexsort((time, event))]
    pulses["charge"] = rng.uniform(0.1, 5, len(pulses))
    pulses["dom"] = rng.integers(0, n_doms, len(pulses))
    pulses["aux"] = rng.random(len(pulses)) < 0.5
    line_fit = np.random.default_rng(1).standard_normal((len(lengths), 3))  # leaves rng as it was
    events["line_fit"] = line_fit / np.linalg.norm(line_fit, axis=1, keepdims=True)
    return events, pulses

def random_geometry(n_doms=5160):
    """Make up GEOMETRY records, strings of 60 DOMs."""
    import data
    geometry = np.zeros(n_doms, data.GEOMETRY)
    geometry["position"] = np.random.default_rng(0).uniform(-500, 500, (n_doms, 3))
    geometry["string"] = np.arange(n_doms) // 60
    return geometry

def write_folder(path, n_doms=5160, **splits):
    """Write a finished data folder from (events, pulses) of each split."""
    import data
    path.mkdir(parents=True, exist_ok=True)
    geometry, counts = random_geometry(n_doms), {}
    geometry.tofile(path / "geometry.bin")
    for name, (events, pulses) in splits.items():
        events.tofile(path / f"{name}_events.bin")
        pulses.tofile(path / f"{name}_pulses.bin")
        counts[name] = {"n_events": len(events), "n_pulses": len(pulses)}
    meta = data.FORMAT | {
            "geometry_crc": zlib.crc32(geometry.tobytes()),
            "rule": {"keep": "random", "max_pulses": 127}, "splits": counts}
    meta["fingerprint"] = data.fingerprint(meta)
    (path / "meta.json").write_text(json.dumps(meta))
    return path
