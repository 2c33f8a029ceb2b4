"""finetune.py and evaluate.py as users run them: tasks, label sets, scores, predictions."""
import json
import os
import re
import shutil
import signal

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import torch.nn.functional as F

import data
import evaluate
import finetune
import utils
from conftest import TINY_RUN, random_events, run, run_ok, torchrun, user_error, write_folder
from test_train import (LONG_RUN, WITHOUT_MODEL, assert_same_run, assert_same_weights, column,
                        start_until, step_of, weights)

def tune(data_dir, out_dir, pretrained, *args, do=run_ok, **kwargs):
    """Run finetune.py as the fixture `finetuned` did; pretrained: folder, or None for scratch."""
    path = f"{pretrained}/ckpt.pt" if pretrained else ""
    return do("finetune.py", f"--data_dir={data_dir}", f"--out_dir={out_dir}",
              f"--pretrained={path}", *(WITHOUT_MODEL if pretrained else TINY_RUN),
              "--direction_loss=vmf", "--head_hidden_size=32", *args, **kwargs)

def score(run_dir, *args, do=run_ok, **kwargs):
    return do("evaluate.py", f"--checkpoint={run_dir}/best.pt", "--device=cpu", "--dtype=float32",
              *args, **kwargs)

def rows_of(run_dir, split="val"):
    """Return the rows of an evaluation by their names."""
    content = json.loads((run_dir / f"evaluation_{split}.json").read_text())
    return {row["bin"]: row for row in content["rows"]}

def read_csv(path):
    return np.genfromtxt(path, delimiter=",", names=True)

def unit(azimuth, zenith):
    x, y = np.cos(azimuth) * np.sin(zenith), np.sin(azimuth) * np.sin(zenith)
    return np.stack([x, y, np.cos(zenith)], axis=-1)

# ---- training -----------------------------------------------------------------------------------

def test_a_frozen_encoder_is_the_checkpoints_and_the_head_moves(demo_data, pretrained, tmp_path):
    done = tune(demo_data, tmp_path / "a", pretrained, "--freeze_backbone=True", "--max_steps=4")
    assert "10 warm-up steps and the cooldown exceed max_steps" in done.stdout
    tune(demo_data, tmp_path / "b", None, "--learning_rate=1e-12")
    before, frozen, scratch = map(weights, (pretrained, tmp_path / "a", tmp_path / "b"))
    assert all(torch.equal(before[x], frozen[x]) for x in frozen if x.startswith("encoder."))
    matrices = [name for name in scratch if name.endswith(("qkv.weight", "up.weight"))]
    assert not any(torch.allclose(before[name], scratch[name], atol=1e-3) for name in matrices)
    moments = utils.load_checkpoint(tmp_path / "a/ckpt.pt")["optimizer"][0]["state"]
    assert len(moments) == 4 and all(x["exp_avg_sq"].any() for x in moments.values())

def test_a_head_begins_near_the_line_fit_that_was_learned(demo_data, tmp_path):
    run_ok("train.py", f"--data_dir={demo_data}", f"--out_dir={tmp_path}", *TINY_RUN,
           "--cls_target=charge+line_fit")
    events, pulses = data.read_events(data.open_split(demo_data, "val"), np.arange(20))
    batch, = data.micro_batches(events, pulses, 20, mask=pulses["aux"])
    _, pred = evaluate.load_model(tmp_path / "ckpt.pt")[0].predict(batch)
    for name in True, False:
        tune(demo_data, tmp_path / f"{name}", tmp_path, "--max_steps=0", f"--line_fit_head={name}")
        net, *_ = evaluate.load_model(tmp_path / f"{name}/best.pt")
        assert not torch.allclose(net(batch), pred["line_fit"], atol=1e-4)
        net.head[2].weight.data[:, 6:] = 0  # the other hidden units, which begin at random
        assert torch.allclose(net(batch), pred["line_fit"], atol=1e-4) == name

BY_HEART = ["--batch_size=50", "--micro_batch_size=50", "--val_split=tuned_copy", "--val_events=0",
            "--eval_interval=30", "--log_interval=30", "--save_interval=60", "--max_steps=60",
            "--learning_rate=1e-2"]

def test_it_learns_direction(demo_data, tmp_path):
    """50 events, learned by heart: the labels, the loss and the head belong together."""
    tune(demo_data, tmp_path, None, *BY_HEART, "--train_events=50", "--val_events=50",
         "--direction_loss=angular", "--max_steps=120", "--learning_rate=5e-3")
    before, *_, after = column(tmp_path, "val_angle_mean")
    assert abs(before - np.pi / 2) < 0.25 and after < 1.0

def test_label_sets_are_nested_and_labelled(demo_data, pretrained, tmp_path):
    """The first 50 labels are used; those after them may even be unknown."""
    shutil.copytree(demo_data, tmp_path / "data")
    events = np.memmap(tmp_path / "data/finetune_events.bin", data.EVENT)
    events["azimuth"][50:] = np.nan
    for name, folder in (("a", demo_data), ("b", tmp_path / "data")):
        tune(folder, tmp_path / name, pretrained, "--train_events=50")
    assert_same_run(tmp_path / "a", tmp_path / "b")
    line = tune(folder, tmp_path / "c", pretrained, "--train_events=60", do=user_error)
    assert f"10 of 60 events have no direction, first event_id {events['event_id'][50]}" in line
    events["azimuth"] = np.where(np.arange(150) // 50 == 1, 1.0, np.nan)
    tune(folder, tmp_path / "d", pretrained, "--train_events=50", "--train_start=50")

def test_stopped_and_resumed_equals_never_stopped(demo_data, pretrained, tmp_path):
    args = [pretrained, "--time_offset_std=500"]
    process = start_until(8, demo_data, tmp_path / "a", *args, begin=tune)
    os.killpg(process.pid, signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 143 and 8 <= step_of(tmp_path / "a") < 40, output
    for name in "ab":
        tune(demo_data, tmp_path / name, *args, *LONG_RUN)
    assert_same_run(tmp_path / "a", tmp_path / "b")

def test_ranks_train_like_one(demo_data, finetuned, pretrained, tmp_path):
    tune(demo_data, tmp_path, pretrained, "--micro_batch_size=5", how=run, launcher=torchrun(2))
    for name in ("loss", "grad_norm", "val_loss", "val_angle_mean", "val_angle_median"):
        assert column(tmp_path, name) == pytest.approx(column(finetuned, name), rel=2e-4), name
    assert_same_weights(tmp_path, finetuned, atol=1e-4)
    mean = rows_of(finetuned)["all"]["mean"]
    assert rows_of(tmp_path)["all"]["mean"] == pytest.approx(mean, rel=2e-4)

def test_time_offsets_are_normal_and_each_event_has_one():
    config, n = finetune.FinetuneConfig(time_offset_std=500.0), 4000
    events, pulses = random_events(np.random.default_rng(0), np.full(n, 3))
    shifted, later = (
        finetune.shift_times(events, pulses, np.arange(n), np.full(n, epoch), config)["time"]
        for epoch in (0, 1))
    offset = (shifted - pulses["time"]).reshape(n, 3)
    assert np.allclose(offset, offset[:, :1], atol=0.01) and not np.allclose(shifted, later)
    assert abs(offset.mean()) < 30 and offset.std() == pytest.approx(500, rel=0.05)

def test_a_run_that_diverges_has_an_exit_status_of_its_own(demo_data, tmp_path):
    line = tune(demo_data, tmp_path, None, "--learning_rate=1e30", do=user_error, status=3)
    assert "try a smaller learning_rate" in line

# ---- tasks, scores, predictions -----------------------------------------------------------------

def test_energy(demo_data, pretrained, tmp_path):
    tune(demo_data, tmp_path, pretrained, "--task=energy", *BY_HEART)
    resolution = column(tmp_path, "val_resolution")
    assert resolution[-1] < 0.9 * resolution[0] and abs(column(tmp_path, "val_bias")[-1]) < 0.5
    score(tmp_path, f"--predictions={tmp_path}/p.csv")
    energy = read_csv(tmp_path / "p.csv")["energy"]
    truth = data.open_split(demo_data, "finetune").events["energy"]
    error, row = np.log10(energy) - np.log10(truth), rows_of(tmp_path, "tuned_copy")["all"]
    assert row["resolution"] == pytest.approx(error.std(), rel=1e-3)
    assert row["bias"] == pytest.approx(error.mean(), abs=1e-4)

def test_class(demo_data, pretrained, tmp_path):
    tune(demo_data, tmp_path, pretrained, "--task=class", *BY_HEART)
    score(tmp_path, f"--predictions={tmp_path}/p.csv")
    p_track, rows = read_csv(tmp_path / "p.csv")["p_track"], rows_of(tmp_path, "tuned_copy")
    is_track = data.open_split(demo_data, "finetune").events["event_class"] == 1
    accuracy = np.mean((p_track > 0.5) == is_track)
    assert rows["all"]["accuracy"] == pytest.approx(accuracy) and accuracy > 0.65
    area = evaluate.roc_area(p_track, is_track)
    assert rows["all"]["roc_area"] == pytest.approx(area, abs=1e-4) and area > 0.75
    assert rows["all"]["guess_accuracy"] == max(is_track.mean(), 1 - is_track.mean())
    assert np.isnan(rows["track"]["roc_area"])  # no cascade to compare with

def test_the_roc_area_counts_pairs():
    """By its definition: pairs in the right order, equal ones as half."""
    rng = np.random.default_rng(0)
    for n_values in (2, 7, 10**9):  # many ties, some, none
        number, is_positive = rng.integers(n_values, size=201), rng.random(201) < 0.3
        difference = number[is_positive][:, None] - number[~is_positive]
        area = ((difference > 0) + 0.5 * (difference == 0)).mean()
        assert evaluate.roc_area(number, is_positive) == pytest.approx(area, abs=1e-12)

def test_scores_are_those_of_the_predictions(demo_data, finetuned, tmp_path):
    """Every number again by a plain formula, from the file of predictions."""
    shutil.copytree(finetuned, tmp_path / "run")
    text = score(tmp_path / "run", f"--predictions={tmp_path}/p.parquet").stdout
    assert "150 labels" in text and "line_fit_mean" in text
    table = pq.read_table(tmp_path / "p.parquet")
    p = {name: table[name].to_numpy() for name in table.column_names}
    events = data.open_split(demo_data, "val").events
    labels = ("azimuth", "zenith", "energy", "event_class")
    assert all(np.array_equal(p[f"true_{name}"], events[name]) for name in labels)
    assert all(np.array_equal(p[name], events[name]) for name in ("event_id", "n_pulses"))
    assert p["azimuth"].min() >= 0 and p["azimuth"].max() < 2 * np.pi and p["kappa"].min() > 0
    direction = unit(p["azimuth"], p["zenith"])
    assert np.allclose(direction, np.stack([p["dir_x"], p["dir_y"], p["dir_z"]], axis=-1))
    truth = unit(events["azimuth"].astype(float), events["zenith"].astype(float))
    error = np.arccos((direction * truth).sum(-1))
    line_fit = np.arccos(np.clip((events["line_fit"] * truth).sum(-1), -1, 1))
    rows, is_track = rows_of(tmp_path / "run"), events["event_class"] == 1
    for row, mask in ((rows["all"], np.ones(103, bool)), (rows["track"], is_track)):
        assert row["n"] == mask.sum() >= 10
        assert row["mean"] == pytest.approx(error[mask].mean(), abs=1e-4)
        assert row["median"] == pytest.approx(np.median(error[mask]), abs=1e-4)
        assert row["q68"] == pytest.approx(np.quantile(error[mask], 0.68), abs=1e-4)
        assert row["line_fit_mean"] == pytest.approx(line_fit[mask].mean(), abs=1e-3)
        guess = truth[mask].mean(0) / np.linalg.norm(truth[mask].mean(0))
        assert row["guess_mean"] == pytest.approx(np.arccos(truth[mask] @ guess).mean(), abs=1e-4)
    # the run itself evaluates 50 events
    best = np.argmin(column(finetuned, "val_loss"))
    for mean in (column(finetuned, "val_angle_mean")[best], rows_of(finetuned)["all"]["mean"]):
        assert mean == pytest.approx(error[:50].mean(), abs=1e-4)

def test_bins_and_bootstrap_errors():
    """Normal errors: the mean is known to sigma / sqrt(n), sigma itself to sigma / sqrt(2 n)."""
    rng, n = np.random.default_rng(0), 5000
    events, _ = random_events(rng, rng.integers(1, 200, n))
    events["energy"], events["event_class"] = 10 ** rng.uniform(2, 5, n), rng.integers(1, 3, n)
    error = rng.normal(0, 0.3, n)
    table = evaluate.evaluation_table({"error": error}, events, "energy")
    rows = {row["bin"]: row for row in table}
    for name, mask in (("all", error < np.inf), ("cascade", events["event_class"] == 2),
                       ("1e3 to 1e4 GeV", np.isin(events["energy"] // 1000, np.arange(1, 10))),
                       ("64 to 127 pulses", np.isin(events["n_pulses"], np.arange(64, 128))),
                       ("zenith 60 to 120 deg", np.abs(np.cos(events["zenith"])) < 0.5)):
        row, n = rows[name], mask.sum()
        assert row["n"] == n and row["bias"] == pytest.approx(error[mask].mean())
        assert row["bias_error"] == pytest.approx(0.3 / n**0.5, rel=0.3)
        assert row["resolution_error"] == pytest.approx(0.3 / (2 * n) ** 0.5, rel=0.3)

def test_calibration_of_events_that_follow_their_kappa():
    """Directions of the von Mises-Fisher law (Wood 1994) are inside a contour as often as said."""
    rng, n = np.random.default_rng(0), 20_000
    for kappa in (0.5, 20.0, 5000.0):
        cosine = 1 + np.log1p(rng.random(n) * np.expm1(-2 * kappa)) / kappa
        events = np.zeros(n, data.EVENT)
        events["zenith"], events["azimuth"] = np.arccos(cosine), rng.uniform(0, 2 * np.pi, n)
        x = np.tile(np.float32([0, 0, kappa]), (n, 1))
        quantile = evaluate.task_scores(x, events, "direction")["quantile"]
        for level in (0.1, 0.5, 0.9):
            assert (quantile < level).mean() == pytest.approx(level, abs=0.012)

def test_unlabelled_events_are_predicted(demo_data, pretrained, finetuned, tmp_path):
    split = data.open_split(demo_data, "test")
    batch, = data.micro_batches(*data.read_events(split, np.arange(40)), 40)
    files = [f"--predictions={tmp_path}/p.csv", f"--embeddings={tmp_path}/e.parquet"]
    for folder, args in ((pretrained, files[1:]), (finetuned, files)):
        text = score(folder, *args, "--split=test", "--batch_size=16").stdout
        net, _, _ = evaluate.load_model(folder / "best.pt")
        cls = net.encoder(batch)[0][batch["row"].argsort()].detach()
        table = pq.read_table(tmp_path / "e.parquet")
        assert np.array_equal(table["event_id"], split.events["event_id"])
        assert np.allclose(np.stack(table["cls"].to_pylist()), cls, atol=1e-5)
    assert "40 of 40 events have no direction" in text
    p, z = read_csv(tmp_path / "p.csv"), F.normalize(net.head(cls), dim=-1)[:, 2].detach()
    assert p.dtype.names == ("event_id", "azimuth", "zenith")
    assert np.array_equal(p["event_id"], split.events["event_id"])
    assert np.allclose(np.cos(p["zenith"]), z, atol=1e-5)

# ---- other data, other detectors, errors --------------------------------------------------------

def test_another_rule_is_a_warning_that_names_both(demo_data, pretrained, finetuned, tmp_path):
    run_ok("prepare.py", f"--input_dir={demo_data.parent}/raw", f"--data_dir={tmp_path}/short",
           "--max_pulses=20", "--splits={'finetune': (3, 3), 'val': (4, 4)}", "--workers=1")
    shutil.copytree(finetuned, tmp_path / "run")
    for done in (score(tmp_path / "run", f"--data_dir={tmp_path}/short"),
                 tune(tmp_path / "short", tmp_path / "new", pretrained, "--max_steps=1")):
        assert re.search(r"warning: .*'max_pulses': 127.*'max_pulses': 20", done.stdout)
    assert rows_of(tmp_path / "run") == rows_of(finetuned) != rows_of(tmp_path / "run", "short_val")

def test_what_knows_doms_by_position_works_in_another_detector(tmp_path):
    """300 DOMs instead of 5160; neither a table nor a linear head can follow."""
    events = random_events(np.random.default_rng(0), np.full(60, 20), n_doms=300)
    for name, n_doms in (("big", 5160), ("small", 300)):
        write_folder(tmp_path / name, n_doms, pretrain=events, finetune=events, val=events)
    def begin(name, script, option, do):
        return do(script, f"--data_dir={tmp_path}/small", f"--out_dir={tmp_path}/{script}_{name}",
                  f"--{option}={tmp_path}/{name}/ckpt.pt", *WITHOUT_MODEL)
    for name, options in (("position", ["--dom_head=position"]), ("linear", []),
                          ("table", ["--use_dom_positions=False", "--dom_head=position"])):
        run_ok("train.py", f"--data_dir={tmp_path}/big", f"--out_dir={tmp_path}/{name}",
               *TINY_RUN, *options)
    text = begin("position", "train.py", "init_from", run_ok).stdout
    assert "another detector (5,160 DOMs, now 300); it knows DOMs by position alone" in text
    for name in ("position", "linear"):  # the direction does not need the DOM head
        begin(name, "finetune.py", "pretrained", run_ok)
    for case in (("table", "finetune.py", "pretrained"), ("table", "train.py", "init_from"),
                 ("linear", "train.py", "init_from")):
        assert "another detector (5,160 DOMs, now 300); only" in begin(*case, user_error)

def test_user_errors(demo_data, pretrained, finetuned, tmp_path):
    for folder, start_from, option, words in (
            (tmp_path, None, "--freeze_backbone=True", "needs a pretrained checkpoint"),
            (tmp_path, pretrained, "--direction_loss=vfm", "direction_loss = 'vfm'"),
            (finetuned, pretrained, "--train_start=1", "of other data"),
            (finetuned, finetuned, "--max_steps=99", "or checkpoint"),
            (finetuned, pretrained, "--batch_size=32", "batch_size = 32"),
            (finetuned, pretrained, "--task=energy", "task = 'energy'")):
        assert words in tune(demo_data, folder, start_from, option, do=user_error), option
    for folder, options, words in (
            (finetuned, f"--predictions={finetuned}/best.pt/x.csv", "Not a directory"),
            (finetuned, "--data_dir=data/nowhere", "data/nowhere/meta.json: no such file"),
            (pretrained, "--n_events=1", "a pretrained model can only write --embeddings")):
        assert words in score(folder, *options.split(), do=user_error), options

def test_a_finished_run_is_evaluated_again_where_its_data_are_now(demo_data, pretrained, tmp_path):
    shutil.copytree(demo_data, tmp_path / "data")
    tune(tmp_path / "data", tmp_path / "run", pretrained)
    (tmp_path / "data").rename(tmp_path / "moved")
    tune(tmp_path / "moved", tmp_path / "run", pretrained)
