"""Random layouts, damaged files, killed runs: the right result, or one line of error.

25 s on one core; FUZZ=8 makes 8 times as many cases, 3 minutes; FUZZ=150 takes an hour."""
import os
import shutil
import signal

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings, strategies as st

import test_prepare as tp
from conftest import call
from test_finetune import tune
from test_graphnet import nubench
from test_prepare import in_this_process
from test_train import assert_same_run, pretrain

def fuzz(test):
    cases = settings(max_examples=int(4 * float(os.environ.get("FUZZ", 1))), database=None,
                     deadline=None, phases=[Phase.generate], suppress_health_check=[*HealthCheck])
    return cases(given(r=st.randoms(use_true_random=True))(test))

def outcome(script, *args):
    """Run a script -> what it printed, or None after one line of error."""
    done = call(script, *args)
    is_error = done.returncode > 0
    assert done.stderr.count("\n") == done.stderr.startswith("error: ") == is_error, done.stderr
    return None if is_error else done.stdout

def make_events(r):
    rng, share = np.random.default_rng(r.getrandbits(32)), r.choice([0.02, 0.5, 0.9, 1, 1])
    time, charge, dom = map(r.choice, (["i4", "i8", "u4", "f4", "f8"], ["f4", "f8"], ["i2", "u8"]))
    for event in tp.make_events(rng, r.randint(1, 30), range(1, 301)):
        q = rng.integers(1, 16_000, n := len(event["time"])) * (rng.random(n) < share) / 1024
        yield event | {"event_id": r.randrange(2**62), "charge": q.astype(charge),  # exact sums
                       "time": (event["time"] * r.choice([1, 50])).astype(time),
                       "sensor_id": (event["sensor_id"] % r.choice([1, 2, 5000])).astype(dom)}

@fuzz
def test_layouts(tmp_path, monkeypatch, r):  # an event that keeps no charge is an error
    first, *others = r.sample(range(700), r.randint(2, 4))
    train = {batch: [*make_events(r)] for batch in sorted([first, *others])}
    rule = r.randint(1, 130), r.getrandbits(31), r.choice(["random", "brightest"])
    monkeypatch.setattr("prepare.CHUNK", r.randint(20, 2000))
    shutil.rmtree(tmp_path)
    tp.write_kaggle(tmp_path / "raw", train, row_group_size=r.randint(1, 5000))
    printed = outcome("prepare.py", f"--input_dir={tmp_path}/raw", f"--data_dir={tmp_path}/out",
                      f"--splits={({'a': [(x, x) for x in others], 'b': (first, first)})}",
                      f"--max_pulses={rule[0]}", f"--seed={rule[1]}", f"--keep={rule[2]}")
    expected = {
        name: tp.reference([event for batch in batches for event in train[batch]], *rule)
        for name, batches in (("a", sorted(others)), ("b", [first]))}
    assert (printed is None) == any((np.add.reduceat(pulses["charge"], events["start"]) == 0).any()
                                    for events, pulses in expected.values())
    for name, records in expected.items() if printed else ():
        for x, y in zip(tp.data.open_split(tmp_path / "out", name)[1:], records):
            tp.assert_equal_records(x, y)

@pytest.fixture
def runs(demo_data, pretrained, finetuned, nubench, tmp_path, monkeypatch):
    """Return folders, and what writes each as tmp_path/out, or reads it, by call or outcome."""
    monkeypatch.setattr("simulate.run_in_workers", tp.utils.run_in_workers)
    raw, out, db = demo_data.parent / "raw", tmp_path / "out", nubench[1][0].partition("+")[2]
    prepare = ["prepare.py", f"--input_dir={raw}", "--verify=True", "--splits="
               "{'pretrain': (1, 2), 'finetune': (3, 3), 'val': (4, 4), 'test': 'test'}"]
    return [(raw, lambda do: do("simulate.py", f"--out_dir={out}", "--n_events=553",
                                "--n_test_events=40", "--events_per_batch=150")),
            (demo_data, lambda do: do(*prepare, f"--data_dir={out}")),
            (pretrained, lambda do: pretrain(demo_data, out, do=do)),
            (finetuned, lambda do: tune(demo_data, out, pretrained, do=do)),
            (demo_data, lambda do: do(*prepare, f"--data_dir={demo_data}")),
            (raw / db, lambda do: do("tools/graphnet.py", *nubench[1], f"--out_dir={out}"))]

@pytest.mark.parametrize("folder, file, reads", [
    (0, "train/batch_4.parquet", [1]), (0, "train_meta.parquet", [1]), (5, "", [5]),
    (0, "sensor_geometry.csv", [1]), (2, "ckpt.pt", [3]), *[(1, name, [4, 2]) for name in (
        "meta.json", "geometry.bin", "pretrain_pulses.bin", "pretrain_events.bin")]])
@fuzz
def test_damaged_files(runs, tmp_path, folder, file, reads, r):
    """Data folders and checkpoints have checksums; the other files may hold other numbers."""
    path, out = runs[folder][0] / file, tmp_path / "out"
    place = r.randrange(len(content := path.read_bytes()))
    flipped = bytes([content[place] ^ 1 << r.randrange(8)]) + content[place + 1:]
    try:
        path.write_bytes(content[:place] + r.choice([flipped, flipped, b""]))
        if None not in [runs[i][1](outcome) for i in reads] and folder in (1, 2):
            assert_same_run(runs[reads[-1]][0], out)
    finally:
        path.write_bytes(content)
        shutil.rmtree(out, ignore_errors=True)

@pytest.mark.parametrize("stage", range(4))
@fuzz
def test_killed_runs(runs, tmp_path, stage, r):
    (gold, run), out = runs[stage], tmp_path / "out"
    if not (pid := os.fork()):
        signal.setitimer(signal.ITIMER_REAL, r.uniform(1e-6, 0.6))  # its signal kills
        os._exit(run(call).returncode)
    os.waitpid(pid, 0)
    assert run(outcome)
    if stage > 1:
        assert_same_run(gold, out)
    for path in [*gold.rglob("*.parquet"), *gold.glob("[fgpv]*.bin")]:
        assert (out / path.relative_to(gold)).read_bytes() == path.read_bytes()
    shutil.rmtree(out)
