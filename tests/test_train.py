"""train.py as users run it: whole runs, torchrun, kill and resume."""
import csv
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

import common
import data
import train
from conftest import (ROOT, TINY_MODEL, TINY_RUN, Fork, forked, forked_ranks, random_events, run, run_ok,
                      torchrun, user_error, write_folder)


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
    assert {p.name for p in out_dir.iterdir()} == {".lock", "ckpt.pt", "best.pt", "log.csv", "config.json"}
    rows = read_log(out_dir)
    assert [int(row["step"]) for row in rows] == list(range(7)) and list(rows[0]) == train.LOG_COLUMNS
    assert [int(row["events"]) for row in rows] == [16 * step for step in range(7)]
    assert [row["step"] for row in rows if row["val_loss"]] == ["0", "3", "6"]
    for row in rows[:6]:
        assert float(row["loss"]) == pytest.approx(float(row["dom_loss"]) + float(row["charge_loss"]),
                                                   rel=1e-4)
    # no head, no number
    assert len(column(out_dir, "val_charge_rms")) == 3 and column(out_dir, "val_center_rms") == []
    assert done.stdout.count("| loss ") == 6 and done.stdout.count("| val_loss ") == 3
    assert common.read_json(out_dir / "config.json")["data_dir"] == str(demo_data)
    saved = common.load_checkpoint(out_dir / "ckpt.pt")
    assert saved["step"] == 6 and saved["config"]["mask_prob"] == 0.25
    assert not any(name.startswith(("module.", "_orig_mod.")) for name in saved["model"])


def test_ten_steps_give_the_known_losses(tmp_path):
    """Any change of masks, model, initial weights or update moves these; change them only on purpose."""
    rng = np.random.default_rng(7)
    splits = {name: random_events(rng, rng.integers(1, 127, n), n_doms=50)
              for name, n in (("pretrain", 200), ("val", 60))}
    folder = write_folder(tmp_path / "data", **splits)
    run_ok("train.py", f"--data_dir={folder}", f"--out_dir={tmp_path}/run", *TINY_RUN, "--max_steps=10",
           "--learning_rate=1e-2", "--eval_interval=10")
    before, after = column(tmp_path / "run", "val_loss")
    assert before == pytest.approx(13.685, abs=2e-3) and after == pytest.approx(7.069, abs=2e-2)


def test_it_learns(demo_data, tmp_path):
    run_ok("train.py", f"--data_dir={demo_data}", f"--out_dir={tmp_path}", *TINY_RUN, "--batch_size=32",
           "--micro_batch_size=32", "--max_steps=80", "--cooldown_steps=20", "--learning_rate=1e-2",
           "--eval_interval=80", "--save_interval=80", "--log_interval=40", "--val_split=pretrain",
           "--val_events=0")
    before, after = column(tmp_path, "val_dom_loss")
    assert before == pytest.approx(np.log(5160), abs=0.5) and after < before - 0.5
    assert column(tmp_path, "val_charge_loss")[1] < 0.15


def test_labels_do_not_leak_into_pretraining(demo_data, tmp_path):
    """The same events with the directions of others: the same run, bit for bit."""
    shutil.copytree(demo_data.parent / "raw", tmp_path / "raw")
    meta = pq.read_table(tmp_path / "raw/train_meta.parquet")
    order = np.random.default_rng(0).permutation(len(meta))
    for name in ("azimuth", "zenith", "energy"):
        meta = meta.set_column(meta.column_names.index(name), name, meta[name].take(order))
    pq.write_table(meta, tmp_path / "raw/train_meta.parquet")
    run_ok("prepare.py", f"--input_dir={tmp_path}/raw", f"--data_dir={tmp_path}/permuted", "--workers=1",
           "--splits={'pretrain': (1, 2), 'finetune': (3, 3), 'val': (4, 4), 'test': 'test'}")
    for folder in (demo_data, tmp_path / "permuted"):
        run_ok("train.py", f"--data_dir={folder}", f"--out_dir={tmp_path}/{folder.name}", *TINY_RUN,
               "--cls_target=charge+center+motion", "--dom_head=position")
    events = [data.open_split(folder, "pretrain").events for folder in (demo_data, tmp_path / "permuted")]
    assert not np.array_equal(events[0]["azimuth"], events[1]["azimuth"])
    assert_same_weights(tmp_path / demo_data.name, tmp_path / "permuted")


def assert_trained_alike(a, b):
    """Two runs whose steps were computed in different ways."""
    for name in ("loss", "dom_loss", "charge_loss", "grad_norm", "val_loss", "val_dom_loss"):
        assert column(a, name) == pytest.approx(column(b, name), rel=2e-4), name
    assert_same_weights(a, b, atol=1e-4)


def test_how_a_step_is_cut_does_not_change_it(pretrained, demo_data, tmp_path):
    run_ok("train.py", f"--data_dir={demo_data}", f"--out_dir={tmp_path}", *TINY_RUN, "--micro_batch_size=3")
    assert_trained_alike(tmp_path, pretrained[0])


@pytest.mark.parametrize("n_ranks", [2, 4])
def test_ranks_train_like_one(pretrained, demo_data, tmp_path, n_ranks):
    """Neither 16 events a step by 3 pieces nor 50 validation events can be shared evenly."""
    run_ok("train.py", f"--data_dir={demo_data}", f"--out_dir={tmp_path}", *TINY_RUN, "--micro_batch_size=5",
           launcher=forked_ranks(n_ranks))
    assert_trained_alike(tmp_path, pretrained[0])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_low_precision_runs_stay_close(pretrained, demo_data, tmp_path, dtype):
    run_ok("train.py", f"--data_dir={demo_data}", f"--out_dir={tmp_path}", *TINY_RUN, f"--dtype={dtype}")
    assert column(tmp_path, "loss") == pytest.approx(column(pretrained[0], "loss"), rel=0.02)
    assert column(tmp_path, "loss") != column(pretrained[0], "loss")
    assert all(value.dtype == torch.float32 for value in weights(tmp_path).values())


# ------------------------------------------------------------------------------------------------------------
# stopping and going on
# ------------------------------------------------------------------------------------------------------------

LONG_RUN = [*TINY_RUN, "--max_steps=40", "--eval_interval=7"]


@pytest.fixture(scope="module")
def straight(demo_data, tmp_path_factory):
    """A run of 40 steps that was never stopped, which keeps some checkpoints; tests only read it."""
    out_dir = tmp_path_factory.mktemp("straight")
    run_ok("train.py", f"--data_dir={demo_data}", f"--out_dir={out_dir}", *LONG_RUN, "--keep_every=20")
    return out_dir


def start(*args, launcher=(sys.executable,)):
    """Start train.py in a process group of its own, as users do; Fork does so with torch loaded."""
    return subprocess.Popen([*launcher, str(ROOT / "train.py"), *map(str, args)], cwd=ROOT, text=True,
                            start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def wait_for_step(process, out_dir, step):
    while not (out_dir / "ckpt.pt").exists() or common.load_checkpoint(out_dir / "ckpt.pt")["step"] < step:
        assert process.poll() is None, "the run ended before it could be stopped"
        time.sleep(0.01)


def assert_same_run(a, b):
    assert_same_weights(a, b)
    for x, y in zip(read_log(a), read_log(b), strict=True):
        assert {**x, "events_per_s": "", "data_ms": ""} == {**y, "events_per_s": "", "data_ms": ""}
    assert weights(a, "best.pt").keys() == weights(b, "best.pt").keys()


def test_killed_and_resumed_equals_never_stopped(straight, demo_data, tmp_path):
    # often killed while it writes
    args = [f"--data_dir={demo_data}", f"--out_dir={tmp_path}", *LONG_RUN, "--save_interval=1"]
    for step in (6, 18):
        process = start(*args) if step == 6 else Fork("train.py", *args)
        wait_for_step(process, tmp_path, step)
        process.kill()
        process.communicate()
    step = common.load_checkpoint(tmp_path / "ckpt.pt")["step"]
    assert 18 <= step < 40
    done = run_ok("train.py", *args)
    assert f"resume from {tmp_path}/ckpt.pt at step {step}" in done.stdout
    assert_same_run(straight, tmp_path)
    again = run_ok("train.py", *args)
    assert "is complete at step 40" in again.stdout and "step " not in again.stderr


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_asked_to_stop_it_saves_and_says_how_to_go_on(straight, demo_data, tmp_path, number, code):
    args = [f"--data_dir={demo_data}", f"--out_dir={tmp_path}", *LONG_RUN, "--save_interval=4"]
    process = Fork("train.py", *args)
    wait_for_step(process, tmp_path, 8)
    os.killpg(process.pid, number)  # Ctrl-C reaches the whole group
    output, _ = process.communicate(timeout=60)
    step = common.load_checkpoint(tmp_path / "ckpt.pt")["step"]
    assert process.returncode == code and "Traceback" not in output, output
    assert f"stopped at step {step}" in output and "the same command goes on" in output and 8 <= step < 40
    run_ok("train.py", *args)
    assert_same_run(straight, tmp_path)


def test_ranks_that_share_no_disk(straight, demo_data, tmp_path):
    """One goes on, the other would begin anew: their weights would drift apart without a word."""
    for rank in (0, 1):
        (tmp_path / f"{rank}/out").mkdir(parents=True)
    shutil.copy(straight / "ckpt_20.pt", tmp_path / "0/out/ckpt.pt")
    in_folder_of_rank = f'cd {tmp_path}/$RANK && exec {sys.executable} "$0" "$@"'
    done = run("train.py", f"--data_dir={demo_data}", "--out_dir=out", *LONG_RUN,
               launcher=(*torchrun(2), "--no-python", "bash", "-c", in_folder_of_rank))
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == 1 and len(lines) == 1, done.stderr
    assert "the ranks do not find the same in out and " in lines[0]


def test_it_runs_without_git(demo_data, tmp_path):
    done = run_ok("train.py", f"--data_dir={demo_data}", f"--out_dir={tmp_path}", *TINY_RUN, "--max_steps=1",
                  env={"PATH": str(tmp_path)})
    assert "commit unknown" in done.stdout


def ranks_of(process):
    """The process ids of torchrun's ranks."""
    tasks = subprocess.run(["ps", "-o", "pid=", "--ppid", str(process.pid)], capture_output=True, text=True)
    return [int(pid) for pid in tasks.stdout.split()]


def test_one_rank_asked_to_stop_stops_all(straight, demo_data, tmp_path):
    args = [f"--data_dir={demo_data}", f"--out_dir={tmp_path}", *LONG_RUN]
    process = start(*args, launcher=torchrun(2))
    wait_for_step(process, tmp_path, 6)
    os.kill(ranks_of(process)[1], signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0 and output.count("stopped at step") == 1, output
    run_ok("train.py", *args)  # and now alone
    assert column(tmp_path, "loss") == pytest.approx(column(straight, "loss"), rel=2e-4)
    assert_same_weights(tmp_path, straight, atol=1e-4)


def test_a_rank_that_dies_takes_the_others_down_and_torchrun_starts_them_again(straight, demo_data, tmp_path):
    args = [f"--data_dir={demo_data}", f"--out_dir={tmp_path}", *LONG_RUN]
    process = start(*args, launcher=(*torchrun(2), "--max_restarts=1"))
    wait_for_step(process, tmp_path, 6)
    os.kill(ranks_of(process)[1], signal.SIGKILL)
    output, _ = process.communicate(timeout=100)
    assert process.returncode == 0 and f"resume from {tmp_path}/ckpt.pt at step" in output, output
    assert column(tmp_path, "loss") == pytest.approx(column(straight, "loss"), rel=2e-4)
    assert_same_weights(tmp_path, straight, atol=1e-4)


def test_a_full_disk_leaves_the_last_checkpoint(straight, demo_data, tmp_path):
    import resource
    shutil.copytree(straight, tmp_path / "run")
    (tmp_path / "run/ckpt_20.pt").rename(tmp_path / "run/ckpt.pt")
    before = (tmp_path / "run/ckpt.pt").read_bytes()
    limits = (len(before) // 2, len(before) // 2)
    line = user_error("train.py", f"--data_dir={demo_data}", f"--out_dir={tmp_path}/run", *LONG_RUN,
                      launcher=forked(before=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limits)))
    assert f"{tmp_path}/run/" in line and ".pt: cannot be written" in line
    assert (tmp_path / "run/ckpt.pt").read_bytes() == before and not list((tmp_path / "run").glob("*.part"))


def test_a_branch_is_the_run_that_would_have_ended_there(straight, demo_data, tmp_path):
    args = [f"--data_dir={demo_data}", *LONG_RUN, "--cooldown_steps=5"]
    run_ok("train.py", *args, f"--out_dir={tmp_path}/short", "--max_steps=25")
    branch = [*args, f"--out_dir={tmp_path}/branch", f"--branch_from={straight}/ckpt_20.pt"]
    run_ok("train.py", *branch)
    assert_same_weights(tmp_path / "short", tmp_path / "branch")
    assert column(tmp_path / "branch", "lr") == column(tmp_path / "short", "lr")[20:]
    done = run_ok("train.py", *branch, "--max_steps=100").stdout  # its cooldown tells where it ends
    assert "is complete at step 25; choose another out_dir" in done
    killed = [*branch, f"--out_dir={tmp_path}/killed", "--cooldown_steps=2000", "--save_interval=10_000"]
    process = Fork("train.py", *killed)
    wait_for_step(process, tmp_path / "killed", 20)  # it has a checkpoint as soon as it has a log
    process.kill()
    process.communicate()
    assert common.load_checkpoint(tmp_path / "killed/ckpt.pt")["step"] == 20
    too_late = user_error("train.py", *args, f"--out_dir={tmp_path}/late",
                          f"--branch_from={straight}/ckpt_40.pt")
    assert "outside the flat part" in too_late and "10 to 38" in too_late
    slow = [f"--data_dir={demo_data}", *TINY_RUN, "--beta2=0.99", "--max_steps=4",
            f"--out_dir={tmp_path}/slow"]
    run_ok("train.py", *slow)
    assert "no flat part" in user_error("train.py", *slow, f"--out_dir={tmp_path}/x",
                                        f"--branch_from={tmp_path}/slow/ckpt.pt")
    assert "mask_prob = 0.25" in user_error("train.py", *branch, f"--out_dir={tmp_path}/other",
                                            "--mask_prob=0.5")
    # the origin's own beginning does not matter
    run_ok("train.py", *args, f"--out_dir={tmp_path}/second", f"--pretrained={straight}/ckpt.pt",
           "--max_steps=20", "--keep_every=12")
    run_ok("train.py", *args, f"--out_dir={tmp_path}/of_second",
           f"--branch_from={tmp_path}/second/ckpt_12.pt")


@pytest.mark.parametrize("knob", ["--dtype=float32", "--dtype=float16", "--optimizer=muon"])
def test_bad_steps_are_skipped_counted_and_end_the_run_if_they_go_on(demo_data, tmp_path, knob):
    """One event of the data holds a NaN: a step of 20 of 60 events meets it once an epoch."""
    shutil.copytree(demo_data, tmp_path / "data")
    split = data.open_split(tmp_path / "data", "pretrain")
    pulses = split.pulses.copy()
    pulses["charge"][split.events["start"][23]] = np.nan
    pulses.tofile(tmp_path / "data/pretrain_pulses.bin")
    event_id = split.events["event_id"][23]
    args = [f"--data_dir={tmp_path}/data", f"--out_dir={tmp_path}/run", *TINY_RUN, "--train_events=60",
            "--batch_size=20", "--max_steps=6", "--val_events=16", knob]
    run_ok("train.py", *args)
    assert column(tmp_path / "run", "bad_steps")[-1] == 2 == np.isnan(column(tmp_path / "run", "loss")).sum()
    assert common.load_checkpoint(tmp_path / "run/ckpt.pt")["bad_steps"] == 2
    assert all(value.isfinite().all() for value in weights(tmp_path / "run").values())
    if knob != "--dtype=float32":
        return

    whole = [*args, f"--out_dir={tmp_path}/whole", "--batch_size=60"]  # it is in every step
    line = user_error("train.py", *whole, "--max_bad_steps=2", "--log_interval=1")
    assert "more than max_bad_steps = 2" in line and "for 1 of its events" in line
    assert f"event_id {event_id}" in line
    ok = common.load_checkpoint(tmp_path / "whole/ckpt.pt")
    assert ok["step"] == 2 and all(value.isfinite().all() for value in ok["model"].values())


def test_muon_is_torchs():
    # which orthogonalises in bfloat16: a few of 100 apart
    generator = torch.Generator().manual_seed(0)
    shapes = [(48, 16), (16, 64), (32, 32)]
    mine, theirs = ([torch.nn.Parameter(torch.ones(shape)) for shape in shapes] for _ in range(2))
    optimizer = train.Muon(mine, lr=0.02, weight_decay=0.1)
    reference = torch.optim.Muon(theirs, lr=0.02, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    optimizer.found_inf = torch.zeros(())
    for _ in range(4):
        for a, b in zip(mine, theirs):
            a.grad = torch.randn(a.shape, generator=generator)
            b.grad = a.grad.clone()
        optimizer.step()
        reference.step()
    for a, b in zip(mine, theirs):
        assert (a - b).abs().max() < 0.1 * (b - 1).abs().max()


def test_muon_learns_and_resumes(demo_data, tmp_path):
    args = [f"--data_dir={demo_data}", f"--out_dir={tmp_path}/run", *TINY_RUN, "--optimizer=muon",
            "--schedule=constant", "--learning_rate=1e-2", "--val_split=pretrain", "--val_events=0",
            "--eval_interval=10"]
    run_ok("train.py", *args, "--max_steps=6")
    run_ok("train.py", *args, "--max_steps=20")
    run_ok("train.py", *args, "--max_steps=20", f"--out_dir={tmp_path}/straight")
    assert_same_weights(tmp_path / "run", tmp_path / "straight")
    before, *_, after = column(tmp_path / "run", "val_loss")
    assert after < before - 1.5
    assert "optimizer = 'muon'" in user_error("train.py", *args, "--max_steps=30", "--optimizer=adamw")


def test_a_run_from_pretrained_weights_goes_on(pretrained, demo_data, tmp_path):
    """It begins where the other ended; no knob has to repeat the architecture, which the checkpoint tells."""
    args = [f"--data_dir={demo_data}", f"--pretrained={pretrained[0]}/ckpt.pt", "--schedule=constant",
            *(knob for knob in TINY_RUN if knob not in TINY_MODEL)]
    run_ok("train.py", *args, f"--out_dir={tmp_path}/a", "--max_steps=3")
    run_ok("train.py", *args, f"--out_dir={tmp_path}/a")
    run_ok("train.py", *args, f"--out_dir={tmp_path}/b")
    assert_same_weights(tmp_path / "a", tmp_path / "b")
    assert column(tmp_path / "b", "val_loss")[0] == pytest.approx(column(pretrained[0], "val_loss")[-1])


def test_what_may_not_change_when_a_run_goes_on(pretrained, demo_data):
    out_dir, _ = pretrained
    before = (out_dir / "ckpt.pt").read_bytes()
    for change, words in (("--batch_size=32", "batch_size = 16, now it is 32"),
                          ("--seed=1", "seed = 0, now it is 1"), ("--num_layers=1", "num_layers = 2, now it "
                                                                                    "is 1"),
                          ("--resume=False", "holds a run")):
        line = user_error("train.py", f"--data_dir={demo_data}", f"--out_dir={out_dir}", *TINY_RUN,
                          "--max_steps=8", change)
        assert words in line and str(out_dir) in line
    assert (out_dir / "ckpt.pt").read_bytes() == before


def test_a_run_that_explodes_ends_in_one_line_and_keeps_its_last_good_checkpoint(demo_data, tmp_path):
    line = user_error("train.py", f"--data_dir={demo_data}", f"--out_dir={tmp_path}", *TINY_RUN,
                      "--learning_rate=1e30", "--warmup_steps=1", status=common.DIVERGED_STATUS)
    assert "another run with a smaller learning_rate" in line and str(tmp_path) in line
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
    for name in ("ckpt.pt", "best.pt", "log.csv"):
        (tmp_path / name).unlink()
    assert "seed = 0, now it is 3" in user_error("train.py", *args, "--seed=3")
    assert "holds a run" in user_error("train.py", *args, "--resume=False")
    run_ok("train.py", *args, "--max_steps=2")


@pytest.mark.parametrize("script", ["train.py", "finetune.py"])
def test_a_lost_checkpoint_does_not_cost_the_rest(demo_data, tmp_path, script):
    args = [f"--data_dir={demo_data}", f"--out_dir={tmp_path}", *TINY_RUN, "--max_steps=2"]
    if script == "finetune.py":
        args += ["--pretrained=", "--head_hidden_size=8"]
    run_ok(script, *args)
    (tmp_path / "ckpt.pt").unlink()
    assert "ckpt.pt is missing" in user_error(script, *args)
    (tmp_path / "best.pt").rename(tmp_path / "elsewhere.pt")
    assert "holds log.csv of a run" in user_error(script, *args)
    assert len(read_log(tmp_path)) == 3
    for name in ("ckpt.pt", "best.pt"):
        shutil.copy(tmp_path / "elsewhere.pt", tmp_path / name)
    assert "is complete at step 2" in run_ok(script, *args).stdout


def test_a_checkpoint_to_keep_is_written_when_the_run_goes_on(straight, demo_data, tmp_path):
    """Killed after ckpt.pt was written at such a step, before the other file was."""
    shutil.copytree(straight, tmp_path / "run")
    (tmp_path / "run/ckpt_20.pt").rename(tmp_path / "run/ckpt.pt")
    (tmp_path / "run/ckpt_40.pt").unlink()
    run_ok("train.py", f"--data_dir={demo_data}", f"--out_dir={tmp_path}/run", *LONG_RUN, "--keep_every=20")
    assert common.load_checkpoint(tmp_path / "run/ckpt_20.pt")["step"] == 20
    assert_same_run(straight, tmp_path / "run")


def test_two_runs_do_not_share_a_folder(demo_data, tmp_path):
    args = [f"--data_dir={demo_data}", f"--out_dir={tmp_path}", *TINY_RUN, "--max_steps=5000"]
    process = Fork("train.py", *args)
    wait_for_step(process, tmp_path, 2)
    assert "another run is at work there" in user_error("train.py", *args)
    process.kill()
    process.communicate()
    step = common.load_checkpoint(tmp_path / "ckpt.pt")["step"]
    # the lock died with its process
    run_ok("train.py", *args, f"--max_steps={step + 2}", "--cooldown_steps=1")


def test_other_events_are_refused(demo_data, tmp_path):
    args = [f"--out_dir={tmp_path}/run", *TINY_RUN]
    run_ok("train.py", f"--data_dir={demo_data}", *args, "--max_steps=1")
    run_ok("prepare.py", f"--input_dir={demo_data.parent}/raw", f"--data_dir={tmp_path}/short",
           "--max_pulses=20", "--splits={'pretrain': (1, 2), 'val': (4, 4)}")
    assert "other events" in user_error("train.py", f"--data_dir={tmp_path}/short", *args, "--max_steps=2")
    shutil.copytree(demo_data, tmp_path / "moved")
    run_ok("train.py", f"--data_dir={tmp_path}/moved", *args, "--max_steps=2")


def test_a_run_says_when_its_learning_rate_is_not_what_was_meant(demo_data, tmp_path):
    args = [f"--data_dir={demo_data}", f"--out_dir={tmp_path}/run", *TINY_RUN, "--val_split=pretrain"]
    short = run_ok("train.py", *args, "--max_steps=12", "--cooldown_steps=8").stdout
    assert "reaches 0.0007, not 0.001; set --cooldown_steps=2" in short and "rises again" not in short
    assert "warning: train_split and val_split are both 'pretrain'" in short
    longer = run_ok("train.py", *args, "--max_steps=24", "--cooldown_steps=8").stdout
    assert "rises again at step 12, from 0 to 0.001" in longer and "keep_every" in longer
    assert "do not fit" not in longer


def test_more_validation_events_than_there_are_means_all(demo_data, tmp_path):
    run_ok("train.py", f"--data_dir={demo_data}", f"--out_dir={tmp_path}/all", *TINY_RUN, "--val_events=0",
           "--max_steps=1")
    run_ok("train.py", f"--data_dir={demo_data}", f"--out_dir={tmp_path}/more", *TINY_RUN,
           "--val_events=99999", "--max_steps=1")
    assert column(tmp_path / "all", "val_loss") == column(tmp_path / "more", "val_loss")


def test_fewer_validation_events_than_ranks(demo_data, tmp_path):
    run_ok("train.py", f"--data_dir={demo_data}", f"--out_dir={tmp_path}", *TINY_RUN, "--val_events=1",
           "--max_steps=1", launcher=forked_ranks(2))
    assert len(column(tmp_path, "val_loss")) == 2


def test_bad_data_is_one_line(demo_data, pretrained, tmp_path):
    args = [*TINY_RUN, f"--out_dir={tmp_path}/run"]
    assert "no such data folder" in user_error("train.py", "--data_dir=nowhere", *args)
    assert "no split 'pretrian'" in user_error("train.py", f"--data_dir={demo_data}",
                                               "--train_split=pretrian", *args)
    saved = common.load_checkpoint(pretrained[0] / "ckpt.pt")
    saved["config"]["mup_base_width"] = 16
    torch.save(saved, tmp_path / "mup.pt")
    assert "carry learning rates of AdamW" in user_error(
        "train.py", f"--data_dir={demo_data}", *args, f"--pretrained={tmp_path}/mup.pt", "--optimizer=muon")
    assert "holds 300 events" in user_error("train.py", f"--data_dir={demo_data}", "--train_events=301",
                                            *args)
    assert not (tmp_path / "run").exists()


# ------------------------------------------------------------------------------------------------------------
# masks and evaluation
# ------------------------------------------------------------------------------------------------------------

def hidden_of(mask_prob=0.25, epoch=0, seed=0, n=4000):
    events, pulses = random_events(np.random.default_rng(0), np.random.default_rng(1).integers(1, 60, n))
    hidden = train.draw_hidden(events, pulses, np.full(n, epoch), mask_prob, seed)
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
        # the forced one counts where none was drawn
        expected = mask_prob * n_good[many] + (1 - mask_prob) ** n_good[many]
        assert n_hidden[many].sum() == pytest.approx(expected.sum(), rel=0.05)


def test_masks_depend_on_seed_and_epoch_and_not_on_the_company():
    events, pulses, hidden = hidden_of()
    assert not np.array_equal(hidden, hidden_of(epoch=1)[2])
    assert not np.array_equal(hidden, hidden_of(seed=1)[2])
    half = slice(events["start"][2000], None)
    assert np.array_equal(train.draw_hidden(events[2000:], pulses[half], np.zeros(2000, int), 0.25, 0),
                          hidden[half])


@pytest.mark.parametrize("n_events", [103, 17, 1])
def test_evaluation_is_the_mean_over_exactly_these_events(demo_data, pretrained, tmp_path, n_events):
    """One by one in float64 against evaluate(), which sorts, cuts and packs."""
    saved = common.load_checkpoint(pretrained[0] / "ckpt.pt")
    config = train.TrainConfig(**{**saved["config"], "micro_batch_size": 8})
    net = train.Pretrainer(config, data.read_geometry(demo_data))
    net.load_state_dict(saved["model"])
    split, _ = data.open_first_events(demo_data, "val", 0)
    process = common.start_process(config)
    found = train.evaluate(net, split, n_events, config, process)
    dom, charge = [], []
    for i in range(n_events):
        batch, = train.masked_batches(split, np.array([i]), np.array([0]), config, train.VAL_SEED)
        with torch.no_grad():
            losses = net(batch)
        dom += [losses["dom"].item()] if batch["n_scored"] else []
        charge.append(losses["charge"].item())
    assert found["val_dom_loss"] == pytest.approx(np.mean(dom), rel=1e-4)
    assert found["val_charge_loss"] == pytest.approx(np.mean(charge), rel=1e-4)
