"""train.py as users run it: whole runs, ranks, stopped and resumed."""
import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections import defaultdict
from contextlib import nullcontext
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import data
import optim
import train
import utils
from conftest import (TINY_MODEL, TINY_RUN, random_events, run, run_ok, start, torchrun, user_error,
                      wait_until, write_folder)
from evaluate import load_model
from model import PolarBERT

WITHOUT_MODEL = [option for option in TINY_RUN if option not in TINY_MODEL]

def pretrain(data_dir, out_dir, *args, do=run_ok, **kwargs):
    """Run train.py on a tiny model, or what `do` says."""
    folders = [f"--data_dir={data_dir}", f"--out_dir={out_dir}"]
    return do("train.py", *folders, *TINY_RUN, *args, **kwargs)

def read_log(out_dir):
    with open(f"{out_dir}/log.csv", newline="") as file:
        return list(csv.DictReader(file))

def column(out_dir, name):
    """Return a column of log.csv, without its empty places."""
    return [float(row[name]) for row in read_log(out_dir) if row[name]]

def weights(out_dir, file="ckpt.pt"):
    return utils.load_checkpoint(f"{out_dir}/{file}")["model"]

def step_of(out_dir):
    """Return the step of a run's last checkpoint, -1 before there is one."""
    path = out_dir / "ckpt.pt"
    return utils.load_checkpoint(path)["step"] if path.exists() else -1

def assert_same_weights(a, b, atol=0.0, file="ckpt.pt"):
    a, b = weights(a, file), weights(b, file)
    assert a.keys() == b.keys() and all(torch.allclose(a[x], b[x], atol=atol, rtol=0) for x in a)

def assert_same_run(a, b):
    """Compare two runs to the bit, except for their speed."""
    assert_same_weights(a, b)
    assert_same_weights(a, b, file="best.pt")
    for x, y in zip(read_log(a), read_log(b), strict=True):
        timed = dict.fromkeys(("events_per_s", "eta_s", "seconds"), "")
        assert x | timed == y | timed

def assert_trained_alike(a, b):
    """Compare two runs whose steps were computed in different ways."""
    for name in ("loss", "dom_loss", "charge_loss", "grad_norm", "val_loss", "val_dom_loss"):
        assert column(a, name) == pytest.approx(column(b, name), rel=2e-4), name
    assert_same_weights(a, b, atol=1e-4)

# ---- whole runs ---------------------------------------------------------------------------------

def test_a_run_leaves_its_files_and_a_row_for_each_step(pretrained, demo_data):
    files = [path.name for path in pretrained.iterdir()]
    assert sorted(files) == [".lock", "best.pt", "ckpt.pt", "config.json", "log.csv"]
    assert column(pretrained, "step") == list(range(7))
    assert column(pretrained, "events") == [16 * step for step in range(7)]
    assert [row["step"] for row in read_log(pretrained) if row["val_loss"]] == ["0", "3", "6"]
    sums = np.add(column(pretrained, "dom_loss"), column(pretrained, "charge_loss"))
    assert column(pretrained, "loss") == pytest.approx(sums, rel=1e-4)
    config = json.loads((pretrained / "config.json").read_text())
    assert config == utils.load_checkpoint(pretrained / "ckpt.pt")["config"]
    assert config["data_dir"] == str(demo_data) and config["mask_prob"] == 0.25

def test_ten_steps_give_the_known_losses(tmp_path):
    """Any change of masks, model, first weights or update moves these; change them on purpose."""
    rng = np.random.default_rng(7)
    splits = {name: random_events(rng, rng.integers(1, 127, n), n_doms=50)
              for name, n in (("pretrain", 200), ("val", 60))}
    pretrain(write_folder(tmp_path / "data", **splits), tmp_path, "--max_steps=10",
             "--learning_rate=1e-2", "--eval_interval=10")
    assert column(tmp_path, "val_dom_loss")[0] == pytest.approx(np.log(5160), abs=0.5)
    before, after = column(tmp_path, "val_loss")
    assert before == pytest.approx(13.681, abs=2e-3) and after == pytest.approx(7.069, abs=2e-2)

def test_labels_do_not_leak_into_pretraining(demo_data, tmp_path):
    """The same events with the labels of others: the same run, bit for bit."""
    shutil.copytree(demo_data, tmp_path / "permuted")
    events = np.memmap(tmp_path / "permuted/pretrain_events.bin", data.EVENT)
    order = np.random.default_rng(0).permutation(len(events))
    for name in ("azimuth", "zenith", "energy", "event_class"):
        events[name] = events[name][order]
    for name, folder in (("a", demo_data), ("b", tmp_path / "permuted")):
        pretrain(folder, tmp_path / name, "--dom_head=position",
                 "--cls_target=charge+center+line_fit")
    assert_same_run(tmp_path / "a", tmp_path / "b")

@pytest.mark.parametrize("size, kwargs", [(3, {}), (5, {"how": run, "launcher": torchrun(2)})])
def test_how_a_step_is_cut_does_not_change_it(pretrained, demo_data, tmp_path, size, kwargs):
    """Pieces of 5 events cut neither the 8 of a rank in a step nor its 25 of 50 evenly."""
    pretrain(demo_data, tmp_path, f"--micro_batch_size={size}", **kwargs)
    assert_trained_alike(tmp_path, pretrained)

@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_low_precision_runs_stay_close(pretrained, demo_data, tmp_path, dtype):
    pretrain(demo_data, tmp_path, f"--dtype={dtype}")
    assert column(tmp_path, "loss") == pytest.approx(column(pretrained, "loss"), rel=0.02)
    assert column(tmp_path, "loss") != column(pretrained, "loss")
    assert all(x.dtype == torch.float32 for x in weights(tmp_path).values())

@pytest.mark.parametrize("n_events", [103, 17, 1])
def test_evaluation_is_the_mean_over_exactly_these_events(demo_data, pretrained, n_events):
    """evaluate() sorts, cuts and packs; here each event is alone."""
    net, run, _ = load_model(pretrained / "ckpt.pt")
    split, config = data.open_split(demo_data, "val", n_events), train.TrainConfig(**vars(run))
    position, columns = net.encoder.embedding.geometry, defaultdict(list)
    for i, unit in product(range(n_events), ("string", "pulse")):
        index, masks = np.array([i]), replace(config, mask_unit=unit)
        batch, = train.masked_batches(split, index, 0 * index, masks, train.VAL_SEED)
        with torch.no_grad():
            losses, (logits, _) = net(batch), net.predict(batch)
        if len(batch["masked"]):
            name = "val_dom_loss" if unit == "pulse" else "val_string_dom_loss"
            columns[name].append(losses["dom"].item())
        if unit == "pulse":
            columns["val_charge_loss"].append(losses["charge"].item())
            for dom, row in zip(batch["dom"][batch["masked"]], logits):
                columns["val_ce"].append(F.cross_entropy(row, dom))
                columns["val_top1"].append(float(row.argmax() == dom))
                columns["val_distance"].append((position[row.argmax()] - position[dom]).norm())
    for unit, name in (("dom", "val_dom_loss"), ("pulse+string", "val_string_dom_loss")):
        other = replace(config, mask_unit=unit, mask_prob=0.5)
        val = train.evaluate(net, split, other, nullcontext())
        assert val.pop("val_loss") == pytest.approx(val[name] + val["val_charge_loss"])
    for name in val:
        assert val[name] == pytest.approx(np.mean(columns[name]), rel=1e-4), name

# ---- stopped and resumed ------------------------------------------------------------------------

LONG_RUN = ["--max_steps=40", "--eval_interval=7"]

@pytest.fixture(scope="module")
def straight(demo_data, tmp_path_factory):
    """The folder of a run of 40 steps that was never stopped; tests only read it."""
    out_dir = tmp_path_factory.mktemp("straight")
    pretrain(demo_data, out_dir, *LONG_RUN, "--keep_every=20")
    return out_dir

def start_until(step, data_dir, out_dir, *args, begin=pretrain, **kwargs):
    """Start a long run in a process of its own, return the process when `step` is saved."""
    process = begin(data_dir, out_dir, *args, *LONG_RUN, do=start, **kwargs)
    wait_until(lambda: step_of(out_dir) >= step, process)
    return process

@pytest.mark.parametrize("number, status", [
    (signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGKILL, -9)])
def test_stopped_or_killed_it_resumes(straight, demo_data, tmp_path, number, status):
    process = start_until(8, demo_data, tmp_path)
    os.killpg(process.pid, number)  # Ctrl-C reaches the whole group
    output, _ = process.communicate(timeout=60)
    step = step_of(tmp_path)
    assert process.returncode == status and "Traceback" not in output, output
    assert "step 7/40 | " in output and 8 <= step < 40  # a redirected log has it at once
    is_saved = f"stopped at step {step}; the same command resumes" in output
    assert is_saved == (number != signal.SIGKILL)
    pretrain(demo_data, tmp_path, *LONG_RUN)
    again = pretrain(demo_data, tmp_path, *LONG_RUN).stdout
    assert "is complete; use another out_dir" in again and "step " not in again
    assert_same_run(straight, tmp_path)

@pytest.mark.parametrize("option", ["--optimizer=muon", "--dtype=float16", "--dom_head=position"])
def test_other_runs_resume_to_the_same_bits(demo_data, tmp_path, option):
    args = ["--schedule=constant", "--learning_rate=1e-2", "--val_split=copy", option,
            "--micro_batch_size=16", "--eval_interval=10", "--save_interval=10"]
    for name, n_steps in (("a", 10), ("a", 20), ("b", 20)):
        pretrain(demo_data, tmp_path / name, *args, f"--max_steps={n_steps}")
    assert_same_run(tmp_path / "a", tmp_path / "b")
    before, *_, after = column(tmp_path / "a", "val_loss")
    assert after < before - 1.5

@pytest.mark.parametrize("number, counts", [(signal.SIGTERM, [1, 1, 1]),
                                            (signal.SIGKILL, [2, 1, 0])])
def test_a_signal_to_one_rank_reaches_all(straight, demo_data, tmp_path, number, counts):
    """Asked to stop, all stop; after a rank has died torchrun starts all again."""
    process = start_until(6, demo_data, tmp_path, launcher=torchrun(2, "--max_restarts=1"))
    ranks = subprocess.check_output(["ps", "-o", "pid=", "--ppid", str(process.pid)]).split()
    os.kill(int(ranks[1]), number)
    output, _ = process.communicate(timeout=100)
    words = "2 x cpu", "step 0/40 | ", "stopped at step"
    assert process.returncode == 0 and [output.count(x) for x in words] == counts, output
    pretrain(demo_data, tmp_path, *LONG_RUN)  # alone
    assert_trained_alike(tmp_path, straight)

def test_ranks_that_share_no_disk_are_refused(straight, demo_data, tmp_path):
    for rank in (0, 1):
        (tmp_path / f"{rank}/out").mkdir(parents=True)
    shutil.copy(straight / "ckpt_20.pt", tmp_path / "0/out/ckpt.pt")
    code = f'cd {tmp_path}/$RANK && exec {sys.executable} "$0" "$@"'
    done = pretrain(demo_data, "out", *LONG_RUN, do=run,
                    launcher=(*torchrun(2, "--no-python"), "bash", "-c", code))
    line, = set(re.findall(r"^error: rank .: (.*)", done.stderr, re.M))
    assert done.returncode == 1 and "ranks find other checkpoints or data" in line, done.stderr

def test_two_runs_do_not_share_a_folder(demo_data, tmp_path):
    with utils.lock_folder(tmp_path):
        assert "another run uses it" in pretrain(demo_data, tmp_path, do=user_error)

def test_a_run_whose_folder_was_removed_leaves_the_new_one_alone(demo_data, tmp_path):
    process = start_until(6, demo_data, tmp_path / "run", "--save_interval=1", "--batch_size=500")
    (tmp_path / "run").rename(tmp_path / "old")
    pretrain(demo_data, tmp_path / "run", "--max_steps=1")
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 1 and "run/.lock: removed while this run used it" in output
    assert step_of(tmp_path / "run") == 1

def test_options_that_differ_are_printed_and_used(pretrained, demo_data, tmp_path):
    shutil.copytree(pretrained, tmp_path / "run")
    text = pretrain(demo_data, tmp_path / "run", "--max_steps=8", "--schedule=constant",
                    "--warmup_steps=1", "--learning_rate=5e-4", "--weight_decay=1000",
                    "--lambda_charge=99").stdout
    assert "resume: learning_rate was 0.001, now it is 0.0005" in text
    assert "resume: weight_decay was 0.1, now it is 1000.0" in text
    assert column(tmp_path / "run", "lr")[-2:] == [5e-4, 5e-4]
    best = utils.load_checkpoint(tmp_path / "run/best.pt")  # a larger loss, but another one
    assert best["config"]["lambda_charge"] == 99
    before, after = (weights(folder)["dom_head.weight"].norm().item()
                     for folder in (pretrained, tmp_path / "run"))
    assert after == pytest.approx(before / 4, rel=0.05)  # two steps of 1 - 1000 * 5e-4

def test_other_models_and_other_data_are_refused(pretrained, demo_data, tmp_path):
    before = (pretrained / "ckpt.pt").read_bytes()
    run_ok("prepare.py", f"--input_dir={demo_data.parent}/raw", f"--data_dir={tmp_path}/short",
           "--max_pulses=20", "--splits={'pretrain': (1, 2), 'val': (4, 4)}", "--workers=1")
    event_id = data.open_split(demo_data, "val").events["event_id"][0]
    for folder, option, words in (
            (demo_data, "--train_split=val", f"both 'val'; event {event_id} would be in both"),
            (demo_data, "--num_layers=1", f"num_layers = 1, but {pretrained}/ckpt.pt has 2"),
            (demo_data, "--train_events=200", f"{pretrained}/ckpt.pt: of other data"),
            (demo_data, "--val_split=copy", f"{pretrained}/ckpt.pt: of other data"),
            (tmp_path / "short", "--max_steps=8", f"{pretrained}/ckpt.pt: of other data")):
        assert words in pretrain(folder, pretrained, option, do=user_error)
    assert (pretrained / "ckpt.pt").read_bytes() == before

def test_a_cooldown_branched_off_equals_a_run_that_ends_there(straight, demo_data, tmp_path):
    args = [*LONG_RUN, "--cooldown_steps=5", "--max_steps=25"]
    pretrain(demo_data, tmp_path / "whole", *args)
    text = pretrain(demo_data, tmp_path / "branch", *args, f"--init_from={straight}/ckpt_20.pt",
                    "--init_optimizer=True").stdout
    assert "resume: max_steps was 40, now it is 25" in text
    assert_same_weights(tmp_path / "whole", tmp_path / "branch")
    assert column(tmp_path / "branch", "lr") == column(tmp_path / "whole", "lr")[20:]

def test_a_run_may_begin_with_the_weights_of_another(pretrained, demo_data, tmp_path):
    run_ok("train.py", f"--data_dir={demo_data}", f"--out_dir={tmp_path}", *WITHOUT_MODEL,
           f"--init_from={pretrained}/ckpt.pt")
    assert column(tmp_path, "val_loss")[0] == pytest.approx(column(pretrained, "val_loss")[-1])

# ---- bad steps, Muon ----------------------------------------------------------------------------

def test_bad_steps_change_nothing_and_are_counted(demo_data, tmp_path):
    """One event holds a NaN; of the six steps, 20 of 60 events each, the steps 1 and 3 have it."""
    shutil.copytree(demo_data, tmp_path / "data")
    event, *_ = np.intersect1d(*(data.step_events(step, 20, 60, seed=0)[0] for step in (1, 3)))
    events = np.memmap(tmp_path / "data/pretrain_events.bin", data.EVENT)
    events["line_fit"][event] = np.nan
    args = ["--train_events=60", "--batch_size=20", "--cls_target=line_fit"]
    pretrain(tmp_path / "data", tmp_path / "run", *args, "--log_interval=2")
    assert column(tmp_path / "run", "bad_steps") == [0, 1, 2]
    assert all(x.isfinite().all() for x in weights(tmp_path / "run").values())
    line = pretrain(tmp_path / "data", tmp_path / "logged", *args, do=user_error, status=3)
    assert "step 1: the loss is not finite" in line
    events.tofile(tmp_path / "data/copy_events.bin")
    line = pretrain(tmp_path / "data", tmp_path / "val", *args, "--val_split=copy",
                    "--val_events=0", do=user_error)
    assert f"before the first step: look for NaN in {tmp_path}/data/copy_*.bin" in line

def test_a_run_that_explodes_ends_in_one_line_and_keeps_good_checkpoints(demo_data, tmp_path):
    line = pretrain(demo_data, tmp_path, "--learning_rate=1e30", "--warmup_steps=1", do=user_error,
                    status=3)
    assert "not finite" in line and "try a smaller learning_rate" in line
    assert all(x.isfinite().all() for x in weights(tmp_path).values())

@pytest.mark.parametrize("harm", [float("nan"), float("inf"), 3e38])
@pytest.mark.parametrize("place", ["blocks.0.mixer.qkv.weight", "embedding.cls"])  # Muon, AdamW
@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_a_bad_gradient_changes_nothing(demo_data, harm, place, dtype, name):
    config = utils.load_config(train.TrainConfig, args=[*TINY_RUN, f"--optimizer={name}"])
    split, index = data.open_split(demo_data, "pretrain"), np.arange(8)
    batch, = train.masked_batches(split, index, 0 * index, config, seed=0)

    def weights_after_steps(harms):
        torch.manual_seed(0)
        net = PolarBERT(config, data.read_folder(demo_data)[1])
        optimizers = optim.make_optimizers(net, config)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024, enabled=dtype == "float16")
        for harm in harms:
            with torch.autocast("cpu", getattr(torch, dtype), enabled=dtype == "float16"):
                losses = net(batch)
            scaler.scale(train.total_loss(losses, config).mean()).backward()
            if harm:
                net.encoder.get_parameter(place).grad.flatten()[3] = harm
            norm = optim.clip_and_step(net, optimizers, scaler, 0.01, config.grad_clip)
            assert norm.isfinite() == (not harm)
            yield torch.cat([x.detach().flatten() for x in net.parameters()])

    first, second, third = weights_after_steps([0, harm, 0])
    assert torch.equal(first, second) and third.isfinite().all()
    _, without = weights_after_steps([0, 0])
    assert torch.allclose(third, without, atol=0 if dtype == "float32" else 1e-3, rtol=0)
    assert not torch.allclose(third, second, atol=5e-3)

def test_muon_is_torchs():
    generator = torch.Generator().manual_seed(0)
    shapes = [(48, 16), (16, 64), (32, 32)]
    ours, theirs = ([torch.nn.Parameter(torch.ones(shape)) for shape in shapes] for _ in range(2))
    optimizer = optim.Muon(ours, lr=0.02, weight_decay=0.1)
    reference = torch.optim.Muon(theirs, lr=0.02, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    optimizer.found_inf = torch.zeros(())
    for _ in range(4):
        for a, b in zip(ours, theirs):
            a.grad = torch.randn(a.shape, generator=generator)
            b.grad = a.grad.clone()
        optimizer.step()
        reference.step()
    assert all((a - b).abs().max() < 0.1 * (b - 1).abs().max() for a, b in zip(ours, theirs))
