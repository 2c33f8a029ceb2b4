"""bench.py runs and compares; what it measures is for people to read."""
import re

from conftest import TINY_MODEL, run_ok
from model import MIXERS


def ratios(output):
    """name -> ratio to the first arm of its table."""
    lines = re.findall(r"^(.+?)  +[\d,.]+ events/s .*? ([\d.]+) x", output, re.M)
    return {name.strip(): float(ratio) for name, ratio in lines}


def test_steps(demo_data):
    done = run_ok("tools/bench.py", "--what=all", f"--data_dir={demo_data}", *TINY_MODEL, "--batch_size=8",
                  "--rounds=1", "--steps=1", "--micro_batch_sizes=4,8", "--device=cpu", "--dtype=float32")
    found = ratios(done.stdout)
    assert list(found)[0] == "padded, all logits, float32 (baseline)" and {*MIXERS} < found.keys()
    assert len(found) == 6 and list(found.values())[0] == 1 and min(found.values()) > 0, done.stdout
    assert done.stdout.count(" tokens/s") == 6 and done.stdout.count("masked and packed events/s") == 2


def test_preparing():
    done = run_ok("tools/bench.py", "--what=prepare", "--n_events=3000", "--rounds=1")
    found = ratios(done.stdout)
    assert found["prepare.pack, the same events"] > 1, done.stdout  # 5 to 8 where nothing else runs
    assert "prepare.py, 2 workers" in found and done.stdout.count("M events/s") == 2
    assert "peak memory" in done.stdout
