"""bench.py runs and compares; what it measures is for people to read."""
import re

import pytest

from conftest import TINY_MODEL, run_ok


def ratios(output):
    """name -> ratio to the first arm of its table."""
    return {name.strip(): float(ratio) for name, ratio in re.findall(r"^(.+?)  +[\d,.]+ events/s .*? "
                                                                     r"([\d.]+) x", output, re.M)}


@pytest.mark.parametrize("what, n_arms", [("train", 3), ("backbones", 3)])
def test_steps(demo_data, what, n_arms):
    done = run_ok("tools/bench.py", f"--what={what}", f"--data_dir={demo_data}", *TINY_MODEL,
                  "--batch_size=8", "--rounds=1", "--steps=1",
                  *(["--micro_batch_sizes=4,8"] if what == "train" else []), "--device=cpu",
                  "--dtype=float32")
    found = ratios(done.stdout)
    assert len(found) == n_arms and list(found.values())[0] == 1 and min(found.values()) > 0, done.stdout
    assert done.stdout.count(" tokens/s") == n_arms and "masked and packed events/s" in done.stdout


def test_preparing():
    done = run_ok("tools/bench.py", "--what=prepare", "--n_events=3000", "--rounds=1")
    found = ratios(done.stdout)
    assert found["prepare.pack, the same events"] > 1, done.stdout  # 5 to 8 where nothing else runs
    assert "prepare.py, 2 workers" in found and done.stdout.count("M events/s") == 2
    assert "peak memory" in done.stdout
