"""train.py as users run it: whole runs, torchrun, kill and resume."""
import csv
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

import common
import data
import train
from conftest import ROOT, TINY_RUN, random_events, run_ok, torchrun, user_error, write_folder


def read_log(out_dir):
    with open(f"{out_dir}/log.csv", newline="") as file:
        return list(csv.DictReader(file))


def column(out_dir, name):
    return [float(row[name]) for row in read_log(out_dir) if row[name]]


def weights(out_dir, name="ckpt.pt"):
    return common.load_checkpoint(f"{out_dir}/{name}")["model"]


def assert_same_weights(a, b, atol=0.0):
    a, b = weights(a), weights(b)
    assert a.keys() == b.keys()
    for name in a:
        assert torch.allclose(a[name], b[name], atol=atol, rtol=0), name


def test_a_run_leaves_what_the_readme_says(pretrained, demo_data):
    out_dir, done = pretrained
    assert {p.name for p in out_dir.iterdir()} == {"ckpt.pt", "best.pt", "log.csv", "config.json"}
    rows = read_log(out_dir)
    assert [int(row["step"]) for row in rows] == list(range(7)) and list(rows[0]) == train.LOG_COLUMNS
    assert [int(row["events"]) for row in rows] == [16 * step for step in range(7)]
    assert [row["step"] for row in rows if row["val_loss"]] == ["0", "3", "6"]
    for row in rows[:6]:
        assert float(row["loss"]) == pytest.approx(float(row["dom_loss"]) + float(row["charge_loss"]), rel=1e-4)
    assert done.stdout.count("| loss ") == 6 and done.stdout.count("| val_loss ") == 3
    assert common.read_json(out_dir / "config.json")["data_dir"] == str(demo_data)
    saved = common.load_checkpoint(out_dir / "ckpt.pt")
    assert saved["step"] == 6 and saved["config"]["mask_prob"] == 0.25
    assert not any(name.startswith(("module.", "_orig_mod.")) for name in saved["model"])


def test_ten_steps_give_the_known_losses(tmp_path):
    """Any change of the masks, the model, its initial weights or the update moves these: change them only on purpose."""
    rng = np.random.default_rng(7)
    folder = write_folder(tmp_path / "data", pretrain=random_events(rng, rng.integers(1, 127, 200), n_doms=50),
                          val=random_events(rng, rng.integers(1, 127, 60), n_doms=50))
    run_ok("train.py", f"--data_dir={folder}", f"--out_dir={tmp_path}/run", *TINY_RUN, "--max_steps=10", "--learning_rate=1e-2",
           "--eval_interval=10")
    before, after = column(tmp_path / "run", "val_loss")
    assert before == pytest.approx(13.685, abs=2e-3) and after == pytest.approx(7.069, abs=2e-2)


def test_it_learns(demo_data, tmp_path):
    run_ok("train.py", f"--data_dir={demo_data}", f"--out_dir={tmp_path}", *TINY_RUN, "--batch_size=32", "--max_steps=80",
           "--cooldown_steps=20", "--learning_rate=1e-2", "--eval_interval=80", "--save_interval=80", "--log_interval=40",
           "--val_split=pretrain", "--val_events=0")
    before, after = column(tmp_path, "val_dom_loss")
    assert before == pytest.approx(np.log(5160), abs=0.5) and after < before - 0.5
    assert column(tmp_path, "val_charge_loss")[1] < 0.15


@pytest.mark.parametrize("knob", ["--micro_batches=5", "--compile=True"])
def test_how_a_step_is_computed_does_not_change_it(pretrained, demo_data, tmp_path, knob):
    run_ok("train.py", f"--data_dir={demo_data}", f"--out_dir={tmp_path}", *TINY_RUN, knob)
    for name in ("loss", "grad_norm", "val_loss"):
        assert column(tmp_path, name) == pytest.approx(column(pretrained[0], name), rel=2e-4), name
    assert_same_weights(tmp_path, pretrained[0], atol=1e-4)


def test_two_ranks_train_like_one(pretrained, demo_data, tmp_path):
    run_ok("train.py", f"--data_dir={demo_data}", f"--out_dir={tmp_path}", *TINY_RUN, launcher=torchrun(2))
    for name in ("loss", "dom_loss", "charge_loss", "grad_norm", "val_loss", "val_dom_loss"):
        assert column(tmp_path, name) == pytest.approx(column(pretrained[0], name), rel=2e-4), name
    assert_same_weights(tmp_path, pretrained[0], atol=1e-4)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_low_precision_runs_stay_close(pretrained, demo_data, tmp_path, dtype):
    run_ok("train.py", f"--data_dir={demo_data}", f"--out_dir={tmp_path}", *TINY_RUN, f"--dtype={dtype}")
    assert column(tmp_path, "loss") == pytest.approx(column(pretrained[0], "loss"), rel=0.02)
    assert column(tmp_path, "loss") != column(pretrained[0], "loss")
    assert all(value.dtype == torch.float32 for value in weights(tmp_path).values())


def test_killed_and_resumed_equals_never_stopped(demo_data, tmp_path):
    args = [f"--data_dir={demo_data}", *TINY_RUN, "--max_steps=40", "--eval_interval=7"]
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    run_ok("train.py", f"--out_dir={straight}", *args)
    process = subprocess.Popen([sys.executable, ROOT / "train.py", f"--out_dir={killed}", *args], stdout=subprocess.DEVNULL,
                               stderr=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"})
    while not (killed / "ckpt.pt").exists() or common.load_checkpoint(killed / "ckpt.pt")["step"] < 8:
        assert process.poll() is None, "the run ended before it could be killed"
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    step = common.load_checkpoint(killed / "ckpt.pt")["step"]
    assert 8 <= step < 40
    done = run_ok("train.py", f"--out_dir={killed}", *args)
    assert f"resume from {killed}/ckpt.pt at step {step}" in done.stdout
    assert_same_weights(straight, killed)
    for a, b in zip(read_log(straight), read_log(killed), strict=True):
        assert {**a, "events_per_s": ""} == {**b, "events_per_s": ""}
    assert weights(straight, "best.pt").keys() == weights(killed, "best.pt").keys()
    again = run_ok("train.py", f"--out_dir={killed}", *args)
    assert "is complete at step 40" in again.stdout and "step " not in again.stderr


def test_what_may_not_change_when_a_run_goes_on(pretrained, demo_data):
    out_dir, _ = pretrained
    before = (out_dir / "ckpt.pt").read_bytes()
    for change, words in (("--batch_size=32", "batch_size = 16, now it is 32"), ("--seed=1", "seed = 0, now it is 1"),
                          ("--num_layers=1", "num_layers = 2, now it is 1"), ("--resume=False", "holds a run")):
        line = user_error("train.py", f"--data_dir={demo_data}", f"--out_dir={out_dir}", *TINY_RUN, "--max_steps=8", change)
        assert words in line and str(out_dir) in line
    assert (out_dir / "ckpt.pt").read_bytes() == before


def test_a_run_that_explodes_ends_in_one_line_and_keeps_its_last_good_checkpoint(demo_data, tmp_path):
    line = user_error("train.py", f"--data_dir={demo_data}", f"--out_dir={tmp_path}", *TINY_RUN, "--learning_rate=1e30",
                      "--warmup_steps=1")
    assert "smaller learning_rate" in line and str(tmp_path) in line
    for file in tmp_path.glob("*.pt"):
        assert all(value.isfinite().all() for value in common.load_checkpoint(file)["model"].values())


def test_precision_may_change_when_a_run_goes_on(demo_data, tmp_path):
    args = [f"--data_dir={demo_data}", f"--out_dir={tmp_path}", *TINY_RUN]
    run_ok("train.py", *args, "--max_steps=2")
    run_ok("train.py", *args, "--max_steps=4", "--dtype=float16")
    run_ok("train.py", *args, "--max_steps=6")
    assert column(tmp_path, "step") == [0, 1, 2, 3, 4, 5, 6]


def test_a_run_killed_before_its_first_checkpoint_is_not_taken_for_another(demo_data, tmp_path):
    args = [f"--data_dir={demo_data}", f"--out_dir={tmp_path}", *TINY_RUN]
    run_ok("train.py", *args, "--max_steps=2")
    (tmp_path / "ckpt.pt").unlink()
    assert "seed = 0, now it is 3" in user_error("train.py", *args, "--seed=3")
    assert "holds a run" in user_error("train.py", *args, "--resume=False")
    run_ok("train.py", *args, "--max_steps=2")


def test_fewer_validation_events_than_ranks(demo_data, tmp_path):
    run_ok("train.py", f"--data_dir={demo_data}", f"--out_dir={tmp_path}", *TINY_RUN, "--val_events=1", "--max_steps=1",
           launcher=torchrun(2))
    assert len(column(tmp_path, "val_loss")) == 2


def test_bad_data_is_one_line(demo_data, tmp_path):
    args = [*TINY_RUN, f"--out_dir={tmp_path}/run"]
    assert "no such data folder" in user_error("train.py", "--data_dir=nowhere", *args)
    assert "no split 'pretrian'" in user_error("train.py", f"--data_dir={demo_data}", "--train_split=pretrian", *args)
    assert "holds 300 events" in user_error("train.py", f"--data_dir={demo_data}", "--train_events=301", *args)
    assert not (tmp_path / "run").exists()


# ----------------------------------------------------------------------------------------------------------------------
# masks and evaluation
# ----------------------------------------------------------------------------------------------------------------------

def hidden_of(mask_prob=0.25, epoch=0, seed=0, n=4000):
    events, pulses = random_events(np.random.default_rng(0), np.random.default_rng(1).integers(1, 60, n))
    hidden = train.hide_pulses(events, pulses, np.full(n, epoch), mask_prob, seed)
    return events, pulses, hidden


def test_only_good_pulses_are_hidden_and_one_in_each_event_that_has_one():
    for mask_prob in (0.01, 0.25, 0.9):
        events, pulses, hidden = hidden_of(mask_prob)
        assert not (hidden & pulses["aux"]).any()
        owner = np.repeat(np.arange(len(events)), events["length"])
        n_good = np.bincount(owner, ~pulses["aux"], len(events))
        n_hidden = np.bincount(owner, hidden, len(events))
        assert np.array_equal(n_hidden > 0, n_good > 0) and (n_good == 0).any()
        many = n_good >= 20
        expected = mask_prob * n_good[many] + (1 - mask_prob) ** n_good[many]  # the forced one counts where none was drawn
        assert n_hidden[many].sum() == pytest.approx(expected.sum(), rel=0.05)


def test_masks_depend_on_seed_and_epoch_and_not_on_the_company():
    events, pulses, hidden = hidden_of()
    assert not np.array_equal(hidden, hidden_of(epoch=1)[2]) and not np.array_equal(hidden, hidden_of(seed=1)[2])
    half = slice(events["start"][2000], None)
    assert np.array_equal(train.hide_pulses(events[2000:], pulses[half], np.zeros(2000, int), 0.25, 0), hidden[half])


@pytest.mark.parametrize("n_events", [103, 17, 1])
def test_evaluation_is_the_mean_over_exactly_these_events(demo_data, pretrained, tmp_path, n_events):
    """One by one in float64 against evaluate(), which pads, sorts and cuts."""
    from types import SimpleNamespace
    saved = common.load_checkpoint(pretrained[0] / "ckpt.pt")
    config = train.TrainConfig(**saved["config"])
    net = train.Pretrainer(config, data.read_geometry(demo_data))
    net.load_state_dict(saved["model"])
    split, _ = data.open_first_events(demo_data, "val", 0)
    ranks = SimpleNamespace(rank=0, world_size=1, device=torch.device("cpu"))
    found = train.evaluate(net, split, n_events, config, ranks, torch.autocast("cpu", enabled=False))
    dom, charge = [], []
    for i in range(n_events):
        batch, = train.masked_batches(split, np.array([i]), np.array([0]), config, train.VAL_SEED)
        with torch.no_grad():
            d, c = net(batch)
        dom += [d.item()] if batch["n_scored"] else []
        charge.append(c.item())
    assert found["val_dom_loss"] == pytest.approx(np.mean(dom), rel=1e-4)
    assert found["val_charge_loss"] == pytest.approx(np.mean(charge), rel=1e-4)
