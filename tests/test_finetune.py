"""finetune.py as users run it: from a checkpoint, from scratch, frozen, evaluation, predictions."""
import csv
import re
import shutil
import subprocess
import sys

import numpy as np
import pyarrow.parquet
import pytest
import torch

import common
import data
import evaluate
import finetune
import tasks
import train
from conftest import (TINY_MODEL, TINY_RUN, forked_ranks, random_events, random_geometry, run_ok, user_error,
                      write_folder)
from test_train import assert_same_weights, column, weights

KNOBS = [*(knob for knob in TINY_RUN if knob not in TINY_MODEL), "--head_hidden_size=16",
         "--warmup_steps=2", "--learning_rate=1e-3"]


def predict(out_dir, *args, **kwargs):
    """evaluate.py on the best weights of a run, on the CPU in float32."""
    return run_ok("evaluate.py", f"--checkpoint={out_dir}/best.pt", "--device=cpu", "--dtype=float32", *args,
                  **kwargs)


@pytest.fixture(scope="module")
def tuned(demo_data, pretrained, tmp_path_factory):
    out_dir = tmp_path_factory.mktemp("tuned")
    done = run_ok("finetune.py", f"--data_dir={demo_data}", f"--out_dir={out_dir}",
                  f"--pretrained={pretrained[0]}/ckpt.pt", *KNOBS)
    predict(out_dir, f"--predictions={out_dir}/predictions.csv", "--n_events=50")
    return out_dir, done


def test_a_run_leaves_what_the_readme_says(tuned):
    out_dir, done = tuned
    assert {p.name for p in out_dir.iterdir()} == {".lock", "ckpt.pt", "best.pt", "log.csv", "config.json",
                                                   "result.txt", "evaluation_val.json", "predictions.csv"}
    assert column(out_dir, "step") == [0, 1, 2, 3, 4, 5, 6]
    assert len(column(out_dir, "val_angle_mean")) == len(column(out_dir, "val_angle_median")) == 3
    result = (out_dir / "result.txt").read_text()
    assert "150 labels" in result and f"mean {min(column(out_dir, 'val_angle_mean')[1:]):.4f}"[:-1] in result
    assert result.strip() in done.stdout


def test_predictions_are_the_directions_that_were_scored(tuned, demo_data):
    out_dir, _ = tuned
    with open(out_dir / "predictions.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    split, _ = data.open_first_events(demo_data, "val", 50)
    assert [int(row["event_id"]) for row in rows] == split.events["event_id"][:50].tolist()
    azimuth, zenith = (np.array([float(row[name]) for row in rows]) for name in ("azimuth", "zenith"))
    assert ((0 <= azimuth) & (azimuth < 2 * np.pi) & (0 <= zenith) & (zenith <= np.pi)).all()
    unit = lambda a, z: np.stack([np.cos(a) * np.sin(z), np.sin(a) * np.sin(z), np.cos(z)])
    truth = unit(split.events["azimuth"][:50].astype(float), split.events["zenith"][:50].astype(float))
    error = np.arccos((unit(azimuth, zenith) * truth).sum(0))
    assert min(column(out_dir, "val_angle_mean")[1:]) == pytest.approx(error.mean(), abs=1e-4)


def test_azimuths_stay_below_two_pi():
    directions = np.array([[1, -1e-20, 0], [0, -1, 0], [0, 0, 1], [-1, 0, 0]], np.float32)
    events = np.zeros(4, data.EVENT)
    table = evaluate.prediction_table(events, {"direction": directions}, evaluate.EvaluateConfig(),
                                      finetune.FinetuneConfig(), [])
    assert table["azimuth"].to_numpy() == pytest.approx([0, 1.5 * np.pi, 0, np.pi])
    assert table["zenith"].to_numpy() == pytest.approx([np.pi / 2, np.pi / 2, 0, np.pi / 2])


def test_the_encoder_comes_from_the_checkpoint(demo_data, pretrained, tmp_path):
    """At a learning rate of next to nothing the encoder is the pretrained one; from scratch it is another."""
    args = [f"--data_dir={demo_data}", *KNOBS, "--learning_rate=1e-12"]
    run_ok("finetune.py", *args, f"--out_dir={tmp_path}/a", f"--pretrained={pretrained[0]}/ckpt.pt")
    run_ok("finetune.py", *args, f"--out_dir={tmp_path}/b", "--pretrained=", *TINY_MODEL)
    before, loaded, scratch = weights(pretrained[0]), weights(tmp_path / "a"), weights(tmp_path / "b")
    encoder = [name for name in before if name.startswith("encoder.") and before[name].ndim == 2
               and "geometry" not in name]
    assert encoder and all(torch.allclose(before[name], loaded[name], atol=1e-6) for name in encoder)
    assert not any(torch.allclose(before[name], scratch[name], atol=1e-3) for name in encoder)


def test_a_frozen_encoder_stays_and_the_head_moves(demo_data, pretrained, tmp_path):
    run_ok("finetune.py", f"--data_dir={demo_data}", *KNOBS, f"--out_dir={tmp_path}",
           "--freeze_backbone=True", f"--pretrained={pretrained[0]}/ckpt.pt", "--max_steps=4")
    before, after = weights(pretrained[0]), weights(tmp_path)
    assert all(torch.equal(before[name], after[name]) for name in after if name.startswith("encoder."))
    saved = common.load_checkpoint(tmp_path / "ckpt.pt")
    moments = saved["optimizer"][0]["state"]
    # two Linear layers
    assert len(moments) == 4 and all(state["exp_avg_sq"].any() for state in moments.values())


def test_it_learns_direction(demo_data, tmp_path):
    """50 events, learned by heart: the labels, the loss and the head belong together."""
    run_ok("finetune.py", f"--data_dir={demo_data}", *KNOBS, *TINY_MODEL, f"--out_dir={tmp_path}",
           "--pretrained=", "--train_events=50", "--batch_size=50", "--micro_batch_size=50",
           "--max_steps=200", "--eval_interval=200", "--log_interval=50", "--save_interval=200",
           "--learning_rate=5e-3", "--val_split=finetune", "--val_events=50")
    before, after = column(tmp_path, "val_angle_mean")
    assert abs(before - np.pi / 2) < 0.25 and after < 1.0


def test_two_ranks_train_and_predict_like_one(tuned, demo_data, pretrained, tmp_path):
    run_ok("finetune.py", f"--data_dir={demo_data}", f"--out_dir={tmp_path}",
           f"--pretrained={pretrained[0]}/ckpt.pt", *KNOBS, launcher=forked_ranks(2))
    predict(tmp_path, f"--predictions={tmp_path}/predictions.csv", "--n_events=50", "--batch_size=16",
            launcher=forked_ranks(2))
    for name in ("loss", "grad_norm", "val_angle_mean", "val_angle_median"):
        assert column(tmp_path, name) == pytest.approx(column(tuned[0], name), rel=2e-4), name
    assert_same_weights(tmp_path, tuned[0], atol=1e-4)
    one, two = (np.loadtxt(folder / "predictions.csv", delimiter=",", skiprows=1)
                for folder in (tuned[0], tmp_path))
    assert np.array_equal(one[:, 0], two[:, 0]) and np.allclose(one, two, atol=1e-3)


def test_stopped_and_resumed_equals_never_stopped(tuned, demo_data, pretrained, tmp_path):
    args = [f"--data_dir={demo_data}", f"--out_dir={tmp_path}", f"--pretrained={pretrained[0]}/ckpt.pt",
            *KNOBS]
    run_ok("finetune.py", *args, "--max_steps=4", "--schedule=constant")
    run_ok("finetune.py", *args, "--max_steps=6", "--schedule=constant")
    straight = [f"--data_dir={demo_data}", f"--out_dir={tmp_path}/straight",
                f"--pretrained={pretrained[0]}/ckpt.pt", *KNOBS]
    run_ok("finetune.py", *straight, "--schedule=constant")
    assert_same_weights(tmp_path, tmp_path / "straight")
    assert column(tmp_path, "loss") == column(tmp_path / "straight", "loss")
    assert "is complete at step 6" in run_ok("finetune.py", *args, "--schedule=constant").stdout


def test_evaluation_only_and_unlabelled_predictions(tuned, demo_data, tmp_path):
    out_dir, done = tuned
    again = predict(out_dir, "--n_events=50")
    assert (out_dir / "result.txt").read_text().strip() in again.stdout
    predict(out_dir, "--split=test", f"--predictions={tmp_path}/test.parquet")
    table = pyarrow.parquet.read_table(tmp_path / "test.parquet")
    events = data.open_split(demo_data, "test").events
    assert table["event_id"].to_numpy().tolist() == events["event_id"].tolist()


def test_the_evaluation_table_by_hand(tuned, demo_data):
    """Every number again from the predictions; the line fit again, event by event."""
    out_dir, done = tuned
    content = common.read_json(out_dir / "evaluation_val.json")
    rows = {row["bin"]: row for row in content["rows"]}
    split = data.open_split(demo_data, "val")
    events, geometry = split.events[:50], data.read_geometry(demo_data)["position"].astype(float)
    predicted = np.loadtxt(out_dir / "predictions.csv", delimiter=",", skiprows=1)
    unit = lambda a, z: np.stack([np.cos(a) * np.sin(z), np.sin(a) * np.sin(z), np.cos(z)], -1)
    truth = unit(events["azimuth"].astype(float), events["zenith"].astype(float))
    error = np.arccos((unit(predicted[:, 1], predicted[:, 2]) * truth).sum(-1))
    fit = []
    for event, u in zip(events, truth):
        pulses = split.pulses[event["start"]:event["start"] + event["length"]]
        pulses = pulses[~pulses["aux"]]
        t, q = pulses["time"].astype(float), pulses["charge"].astype(float)
        v = ((q * (t - np.average(t, weights=q)))[:, None] * geometry[pulses["dom"]]).sum(0)
        fit.append(np.arccos(np.clip(-v @ u / np.linalg.norm(v), -1, 1)))
    tracks = events["event_class"] == 1
    assert rows["all"]["n"] == 50 and rows["track"]["n"] == tracks.sum() >= 10
    for row, mask in ((rows["all"], np.ones(50, bool)), (rows["track"], tracks)):
        assert row["mean"] == pytest.approx(error[mask].mean(), abs=1e-4)
        assert row["68 %"] == pytest.approx(np.quantile(error[mask], 0.68), abs=1e-4)
        assert row["line_fit_median"] == pytest.approx(np.median(np.array(fit)[mask]), abs=1e-3)
        assert row["mean_error"] == pytest.approx(error[mask].std() / mask.sum() ** 0.5, rel=0.35)
        guess = truth[mask].mean(0) / np.linalg.norm(truth[mask].mean(0))
        assert row["guess_mean"] == pytest.approx(np.arccos(truth[mask] @ guess).mean(), abs=1e-4)
    assert sum(row["n"] for row in content["rows"] if row["kind"] == "zenith") <= 50
    assert sum(content["histogram"]["error"]) == 50 and "line fit mean" in done.stdout


def test_vmf_tells_its_uncertainty(demo_data, tmp_path):
    args = [f"--data_dir={demo_data}", *KNOBS, *TINY_MODEL, f"--out_dir={tmp_path}", "--pretrained=",
            "--direction_loss=angular+vmf", "--max_steps=3", "--val_events=3"]
    done = run_ok("finetune.py", *args)
    predict(tmp_path, "--n_events=3", f"--predictions={tmp_path}/p.parquet")
    assert "inside their 50 % contour" in done.stdout
    table = pyarrow.parquet.read_table(tmp_path / "p.parquet")
    truth = ["true_azimuth", "true_zenith", "true_energy", "true_event_class"]
    assert table.column_names == ["event_id", "azimuth", "zenith", "x", "y", "z", "kappa", "n_pulses", *truth]
    assert min(table["kappa"].to_pylist()) > 0 and len(table) == 3
    events = data.open_split(demo_data, "val").events[:3]
    for name, column_name in (("n_pulses", "n_pulses"), ("zenith", "true_zenith"),
                              ("event_class", "true_event_class")):
        assert table[column_name].to_numpy().tolist() == events[name].tolist()
    # too few events to tell an error: none is claimed
    whole, = common.read_json(tmp_path / "evaluation_val.json")["rows"]
    assert whole["n"] == 3 and whole["mean_error"] is None
    assert "+-" not in (tmp_path / "result.txt").read_text()
    assert re.search(r"not shown, fewer than 10 events: .*zenith 60 to 120 deg \(\d\)", done.stdout)


def test_calibration_of_events_that_follow_their_kappa():
    """Directions drawn from the von Mises-Fisher law (Wood 1994) lie inside a contour as often as it says."""
    rng = np.random.default_rng(0)
    for kappa in (0.5, 20.0, 5000.0):
        cosine = 1 + np.log1p(rng.random(20_000) * np.expm1(-2 * kappa)) / kappa
        angle = rng.uniform(0, 2 * np.pi, 20_000)
        sine = np.sqrt(1 - cosine**2)
        truth = torch.from_numpy(np.stack([sine * np.cos(angle), sine * np.sin(angle), cosine], -1))
        quantile = tasks.vmf_quantile(torch.tensor([0.0, 0.0, 1.0]).double(), torch.tensor(kappa).double(),
                                      truth)
        for level in (0.1, 0.5, 0.9):
            assert (quantile < level).double().mean().item() == pytest.approx(level, abs=0.012)


def test_energy(demo_data, pretrained, tmp_path):
    args = [f"--data_dir={demo_data}", *KNOBS, f"--out_dir={tmp_path}",
            f"--pretrained={pretrained[0]}/ckpt.pt", "--task=energy", "--batch_size=50",
            "--micro_batch_size=50", "--max_steps=60", "--learning_rate=1e-2", "--eval_interval=30",
            "--log_interval=30", "--save_interval=60"]
    run_ok("finetune.py", *args)
    predict(tmp_path, "--n_events=50", f"--predictions={tmp_path}/p.csv")
    resolution = column(tmp_path, "val_resolution")
    assert resolution[-1] < 0.9 * resolution[0] and abs(column(tmp_path, "val_bias")[-1]) < 0.5
    assert "resolution" in (tmp_path / "result.txt").read_text()
    energy = np.loadtxt(tmp_path / "p.csv", delimiter=",", skiprows=1)[:, 1]
    truth = data.open_split(demo_data, "val").events["energy"][:50]
    rows = common.read_json(tmp_path / "evaluation_val.json")["rows"]
    assert rows[0]["resolution"] == pytest.approx((np.log10(energy) - np.log10(truth)).std(), rel=1e-3)
    line = user_error("finetune.py", *args, "--task=direction")
    assert "task = 'energy'" in line and "'direction'" in line


def test_class(demo_data, pretrained, tmp_path):
    """Learned by heart; every number again from the predictions, the line fit's speed event by event."""
    args = [f"--data_dir={demo_data}", *KNOBS, f"--pretrained={pretrained[0]}/ckpt.pt", "--task=class",
            "--batch_size=50", "--micro_batch_size=50", "--max_steps=60", "--learning_rate=1e-2",
            "--eval_interval=30", "--save_interval=60", "--val_split=finetune", "--val_events=0"]
    done = run_ok("finetune.py", *args, f"--out_dir={tmp_path}/run")
    predict(tmp_path / "run", f"--predictions={tmp_path}/p.csv")
    split, geometry = data.open_split(demo_data, "finetune"), data.read_geometry(demo_data)["position"]
    table = np.loadtxt(tmp_path / "p.csv", delimiter=",", skiprows=1)
    assert (tmp_path / "p.csv").read_text().splitlines()[0].replace('"', "") == "event_id,p_track"
    assert table[:, 0].tolist() == split.events["event_id"].tolist()
    p_track, is_track, speed = table[:, 1], split.events["event_class"] == 1, []
    for event in split.events:
        pulses = split.pulses[event["start"]:event["start"] + event["length"]]
        pulses = pulses[~pulses["aux"]]
        t, x, q = pulses["time"].astype(float), geometry[pulses["dom"]], pulses["charge"].astype(float)
        t, x = t - np.average(t, weights=q), x - np.average(x, axis=0, weights=q)
        speed.append(np.linalg.norm((q * t) @ x) / max(q @ t**2, 100 * q.sum()))
    rows = {row["bin"]: row for row in common.read_json(tmp_path / "run/evaluation_finetune.json")["rows"]}
    whole = rows["all"]
    accuracy = np.mean((p_track > 0.5) == is_track)
    assert whole["accuracy"] == pytest.approx(accuracy) and 0.7 < accuracy
    assert whole["accuracy_error"] == pytest.approx((accuracy * (1 - accuracy) / 150) ** 0.5, rel=0.35)
    assert whole["roc_area"] == pytest.approx(area_of_pairs(p_track, is_track), abs=1e-4)
    assert whole["line_fit_roc_area"] == pytest.approx(area_of_pairs(np.array(speed), is_track), abs=2e-3)
    assert whole["guess_accuracy"] == pytest.approx(max(is_track.mean(), 1 - is_track.mean()))
    assert rows["track"]["accuracy"] == pytest.approx((p_track > 0.5)[is_track].mean())
    assert rows["track"]["roc_area"] is rows["track"]["roc_area_error"] is None  # no cascade to compare with
    best = 1 + np.argmin(column(tmp_path / "run", "val_loss")[1:])
    assert column(tmp_path / "run", "val_accuracy")[best] == pytest.approx(accuracy, abs=1e-4)
    assert column(tmp_path / "run", "val_roc_area")[-1] > 0.75 and "guess accuracy" in done.stdout
    # a class of 0 is unknown
    shutil.copytree(demo_data, tmp_path / "part")
    events = np.fromfile(tmp_path / "part/finetune_events.bin", data.EVENT)
    events["event_class"][7] = 0
    events.tofile(tmp_path / "part/finetune_events.bin")
    line = user_error("finetune.py", *args, f"--data_dir={tmp_path}/part", f"--out_dir={tmp_path}/other")
    assert "1 of 150 events have no class" in line and str(events["event_id"][7]) in line


def area_of_pairs(number, is_positive):
    """The ROC area by its definition: pairs that are in the right order, those of equal numbers as half."""
    difference = number[is_positive][:, None] - number[~is_positive]
    return ((difference > 0) + 0.5 * (difference == 0)).mean()


def test_the_roc_area_counts_pairs():
    rng = np.random.default_rng(0)
    for n_values in (2, 7, 10**9):  # many ties, some, none
        number, is_positive = rng.integers(n_values, size=201), rng.random(201) < 0.3
        area = tasks.roc_area(number.astype(np.float32), is_positive)
        assert area == pytest.approx(area_of_pairs(number.astype(np.float32), is_positive), abs=1e-12)
    assert tasks.roc_area(np.arange(4), np.array([0, 0, 1, 1])) == 1
    assert np.isnan(tasks.roc_area(np.arange(3), np.ones(3, bool)))


def test_the_head_may_learn_faster_and_events_may_be_shifted(demo_data, pretrained, tmp_path):
    args = [f"--data_dir={demo_data}", *KNOBS, f"--pretrained={pretrained[0]}/ckpt.pt", "--max_steps=1"]
    run_ok("finetune.py", *args, f"--out_dir={tmp_path}/a", "--learning_rate=1e-12")
    run_ok("finetune.py", *args, f"--out_dir={tmp_path}/b", "--learning_rate=1e-12", "--head_lr_factor=1e9",
           "--time_offset_std=500")
    a, b, before = weights(tmp_path / "a"), weights(tmp_path / "b"), weights(pretrained[0])
    assert not torch.allclose(a["head.0.weight"], b["head.0.weight"], atol=1e-5)
    assert all(torch.allclose(before[name], b[name], atol=1e-6) for name in b if name.startswith("encoder."))
    # the same weights saw shifted events
    assert column(tmp_path / "a", "loss") != column(tmp_path / "b", "loss")


def test_patience_ends_a_run_and_it_stays_ended(demo_data, pretrained, tmp_path):
    args = [f"--data_dir={demo_data}", *KNOBS, f"--out_dir={tmp_path}",
            f"--pretrained={pretrained[0]}/ckpt.pt", "--patience=2", "--eval_interval=1", "--max_steps=200",
            "--learning_rate=1e-12", "--save_interval=100"]
    run_ok("finetune.py", *args)
    best, last = (common.load_checkpoint(tmp_path / name)["step"] for name in ("best.pt", "ckpt.pt"))
    assert last == best + 2 < 200
    assert f"is complete at step {last}" in run_ok("finetune.py", *args).stdout
    stopped = common.load_checkpoint(tmp_path / "ckpt.pt") | {"ended": False}  # before it evaluated there
    torch.save(stopped, tmp_path / "ckpt.pt")
    output = run_ok("finetune.py", *args).stdout
    assert "is complete" not in output and f"no lower val_loss than at step {best}" in output


EXPORTED = {"direction": ["--direction_loss=vmf"], "energy": ["--backbone=mamba", "--task=energy"],
            "class": ["--backbone=gru", "--task=class"]}


@pytest.fixture(scope="module")
def exported(demo_data, tmp_path_factory):
    """A folder with exported models, predictions by evaluate.py, and what the models themselves say."""
    folder = tmp_path_factory.mktemp("exported")
    # 20 pulses, not 127: torch.export unrolls a GRU over the longest event, which takes 30 s
    run_ok("prepare.py", f"--input_dir={demo_data.parent}/raw", f"--data_dir={folder}/data",
           "--max_pulses=20", "--splits={'finetune': (3, 3), 'val': (4, 4)}")
    for name, knobs in EXPORTED.items():
        run_ok("finetune.py", f"--data_dir={folder}/data", *KNOBS, *TINY_MODEL, f"--out_dir={folder}/{name}",
               "--pretrained=", "--num_layers=1", "--max_steps=1", *knobs)
        predict(folder / name, f"--predictions={folder}/{name}.parquet", "--n_events=20")
        run_ok("tools/export.py", f"--checkpoint={folder}/{name}/best.pt", f"--out={folder}/{name}.pt2")
    events, pulses = data.read_events(data.open_split(folder / "data", "val"), np.arange(20))
    columns = {name: torch.from_numpy(pulses[name].copy()) for name in ("time", "charge", "aux")}
    columns["dom"] = torch.from_numpy(pulses["dom"].astype(np.int64))
    torch.save((columns, torch.from_numpy(events["length"].astype(np.int64))), folder / "pulses.pt")
    code = ("import sys, torch\n"
            "columns, length = torch.load('pulses.pt')\n"
            "longer = {name: column[:21] for name, column in columns.items()}\n"
            "for name in sys.argv[1:]:\n"
            "    model = torch.export.load(f'{name}.pt2').module()\n"
            "    torch.save(model(columns, length), f'{name}.pt')\n"
            "    try: model(longer, torch.tensor([21]))\n"
            "    except RuntimeError as error: assert 'more than 20 pulses' in str(error), error\n"
            "    else: assert False, 'an event that is too long was taken'")
    subprocess.run([sys.executable, "-c", code, *EXPORTED], cwd=folder, check=True)
    return folder


@pytest.mark.parametrize("name", EXPORTED)
def test_an_exported_model_runs_without_this_repository(exported, name):
    found = torch.load(exported / f"{name}.pt")
    table = pyarrow.parquet.read_table(exported / f"{name}.parquet")
    if name == "energy":
        assert found["log_energy"].numpy() == pytest.approx(np.log10(table["energy"].to_numpy()), abs=1e-4)
    elif name == "class":
        assert found["p_track"].numpy() == pytest.approx(table["p_track"].to_numpy(), abs=1e-5)
    else:
        assert found["direction"][:, 2].numpy() == pytest.approx(table["z"].to_numpy(), abs=1e-4)
        assert found["kappa"].numpy() == pytest.approx(table["kappa"].to_numpy(), rel=1e-3)


def test_user_errors(tuned, demo_data, pretrained, tmp_path):
    args = [f"--data_dir={demo_data}", f"--out_dir={tmp_path}/run", *KNOBS]
    checkpoint = f"--pretrained={pretrained[0]}/ckpt.pt"
    line = user_error("finetune.py", *args, checkpoint, "--num_layers=3")
    assert "num_layers = 3" in line and line.endswith("or end the command with --num_layers=2")
    assert "no such checkpoint" in user_error("finetune.py", *args, "--pretrained=nowhere.pt")
    assert "have no direction" in user_error("finetune.py", *args, checkpoint, "--train_split=test",
                                             "--train_events=0")
    assert "have no direction" in user_error("finetune.py", *args, checkpoint, "--val_split=test",
                                             "--val_events=0")
    assert "optimizer is a knob of train.py" in user_error("finetune.py", "sample_config/demo.py")
    assert "no meaning for task = 'energy'" in user_error("finetune.py", *args, checkpoint, "--task=energy",
                                                          "--direction_loss=vmf")
    assert "needs a pretrained" in user_error("finetune.py", *args, "--pretrained=", "--freeze_backbone=True")
    assert not (tmp_path / "run").exists()


def test_user_errors_of_evaluate(tuned, demo_data, pretrained, tmp_path):
    best = f"--checkpoint={tuned[0]}/best.pt"
    (tmp_path / "d.csv").mkdir()
    for flags, words in ((["--predictions=x.txt"], "must end in .csv or .parquet"),
                         (["--predictions=/dev/null/x.csv"], "no folder to write in"),
                         ([f"--predictions={tmp_path}/new/x.csv"], f"mkdir -p {tmp_path}/new"),
                         ([f"--predictions={tmp_path}"], "must end in"),
                         ([f"--predictions={tmp_path}/d.csv"], "is a folder"),
                         (["--n_events=-5"], "n_events = -5: must not be negative"),
                         (["--split=test"], "40 of 40 events have no direction to evaluate with"),
                         (["--split=tset"], "no split 'tset'"),
                         (["--data_dir=data/nowhere"], "no such data folder"),
                         ([f"--checkpoint={pretrained[0]}/ckpt.pt"], "is a pretrained checkpoint"),
                         (["--checkpoint=nowhere.pt"], "no such checkpoint")):
        assert words in user_error("evaluate.py", best, "--device=cpu", *flags), flags
    assert not (tmp_path / "new").exists()


def test_embeddings_are_what_cls_knows(tuned, demo_data, pretrained, tmp_path):
    """Of a pretrained and of a tuned model, on one rank and on two, in the order of the events."""
    path = tmp_path / "e.parquet"
    split = data.open_split(demo_data, "val")
    for checkpoint, launcher in ((f"{pretrained[0]}/ckpt.pt", None),
                                 (f"{tuned[0]}/best.pt", forked_ranks(2))):
        run_ok("evaluate.py", f"--checkpoint={checkpoint}", f"--embeddings={path}", "--device=cpu",
               "--batch_size=40", "--dtype=float32", launcher=launcher)
        table = pyarrow.parquet.read_table(path)
        assert table["event_id"].to_numpy().tolist() == split.events["event_id"].tolist()
        model, _, _ = evaluate.load_model(checkpoint)
        batch, = data.micro_batches(*data.read_events(split, np.arange(len(split))), len(split))
        with torch.no_grad():
            cls = model.encoder(batch)[0][batch["row"].argsort()]
        assert np.allclose(np.stack(table["cls"].to_pylist()), cls, atol=1e-5)


def move_a_dom(demo_data, folder):
    shutil.copytree(demo_data, folder)
    geometry = data.read_geometry(demo_data)
    geometry["position"][77, 2] += 1
    geometry.tofile(folder / "geometry.bin")


def test_a_run_goes_on_in_its_own_detector_only(tuned, demo_data, pretrained, tmp_path):
    move_a_dom(demo_data, tmp_path / "moved")
    shutil.copytree(tuned[0], tmp_path / "run")
    line = user_error("finetune.py", f"--data_dir={tmp_path}/moved", f"--out_dir={tmp_path}/run", *KNOBS,
                      f"--pretrained={pretrained[0]}/ckpt.pt", "--max_steps=50")
    assert "another detector" in line and "1 DOMs lie elsewhere, by 0.0 m (median) to 1.0 m" in line


def test_what_knows_doms_by_their_positions_goes_on_in_another_detector(tmp_path):
    """300 DOMs, not 5160, for the masked task and a direction; a table and a linear head are refused."""
    rng, ours = np.random.default_rng(0), random_geometry(300)
    big = write_folder(tmp_path / "big", **{name: random_events(rng, rng.integers(3, 40, 60))
                                            for name in ("pretrain", "val")})
    small = write_folder(tmp_path / "small", **{name: random_events(rng, rng.integers(3, 40, 60), 300)
                                                for name in ("pretrain", "finetune", "val")})
    ours.tofile(small / "geometry.bin")
    meta = common.read_json(small / "meta.json")
    common.write_json(small / "meta.json", meta | {"n_doms": 300})
    for name, flags in (("position", ["--dom_head=position"]), ("linear", []),
                        ("table", ["--use_dom_table=True", "--dom_head=position"])):
        run_ok("train.py", f"--data_dir={big}", f"--out_dir={tmp_path}/{name}", *TINY_RUN, *flags)
    there = [f"--data_dir={small}", *TINY_RUN[len(TINY_MODEL):]]

    def begin(name, script, *flags):
        return [script, f"--pretrained={tmp_path}/{name}/ckpt.pt", f"--out_dir={tmp_path}/{script}_{name}",
                *there, *flags]
    assert "it has 5,160 DOMs, not 300" in run_ok(*begin("position", "train.py")).stdout
    model, _, _ = evaluate.load_model(f"{tmp_path}/train.py_position/ckpt.pt")
    assert len(model.dom_head.bias) == 300
    first = np.genfromtxt(tmp_path / "train.py_position/log.csv", delimiter=",", names=True)[0]
    as_it_came, config, _ = evaluate.load_model(f"{tmp_path}/position/ckpt.pt", small)
    config.micro_batch_size, index = 50, np.arange(50)
    batch, = train.masked_batches(data.open_split(small, "val"), index, 0 * index, config, train.VAL_SEED)
    with torch.no_grad():
        loss = as_it_came(batch)["dom"].sum() / batch["n_scored"]
    assert first["val_dom_loss"] == pytest.approx(loss.item(), rel=1e-4)

    for name in ("position", "linear"):  # the direction does not need the DOM head
        run_ok(*begin(name, "finetune.py", "--cooldown_steps=0"))
    assert "table of DOMs" in user_error(*begin("table", "finetune.py"))
    assert "table of DOMs" in user_error(*begin("table", "train.py"))
    line = user_error(*begin("linear", "train.py"))
    assert "dom_head = 'linear'" in line and "it has 5,160 DOMs, not 300" in line


def test_each_evaluation_keeps_to_itself(tuned, demo_data, tmp_path):
    """Another checkpoint, other events or other data do not overwrite what is known of best.pt."""
    run = tmp_path / "run"
    shutil.copytree(tuned[0], run)
    run_ok("prepare.py", f"--input_dir={demo_data.parent}/raw", f"--data_dir={tmp_path}/other",
           "--splits={'val': (4, 4)}", "--max_pulses=20")
    before = common.read_json(run / "evaluation_val.json")
    assert (before["checkpoint"], before["n_events"]) == ("best.pt", 50)
    assert before["step"] == common.load_checkpoint(run / "best.pt")["step"]
    predict(run, "--n_events=0")
    predict(run, "--n_events=50", f"--checkpoint={run}/ckpt.pt")
    predict(run, "--split=pretrain")
    predict(run, f"--data_dir={tmp_path}/other", "--n_events=50")
    names = ["val", "pretrain", "val_103", "val_ckpt", "val_other"]
    assert {path.name for path in run.glob("evaluation*")} == {f"evaluation_{name}.json" for name in names}
    assert common.read_json(run / "evaluation_val.json") == before
    found = {name: common.read_json(run / f"evaluation_{name}.json") for name in names}
    assert found["val_103"]["n_events"] == 103 and found["val_ckpt"]["checkpoint"] == "ckpt.pt"
    assert found["val_other"]["data"] != before["data"]
    predict(run, "--n_events=50")
    assert common.read_json(run / "evaluation_val.json")["rows"] == before["rows"]


def test_a_run_without_best_weights_says_what_can_be_evaluated(tuned, demo_data, pretrained, tmp_path):
    shutil.copytree(tuned[0], tmp_path / "run")
    (tmp_path / "run/best.pt").unlink()
    line = user_error("finetune.py", f"--data_dir={demo_data}", f"--out_dir={tmp_path}/run", *KNOBS,
                      f"--pretrained={pretrained[0]}/ckpt.pt")
    assert "best.pt is missing" in line and f"--checkpoint={tmp_path}/run/ckpt.pt" in line


def test_a_run_that_diverges_has_an_exit_status_of_its_own(demo_data, tmp_path):
    args = [f"--data_dir={demo_data}", *KNOBS, *TINY_MODEL, f"--out_dir={tmp_path}", "--pretrained=",
            "--warmup_steps=1", "--learning_rate=1e30", "--grad_clip=1e30"]
    assert "smaller learning_rate" in user_error("finetune.py", *args, status=common.DIVERGED_STATUS)


@pytest.mark.parametrize("name", ["weights.pth", "lightning.ckpt"])
def test_a_published_checkpoint_can_be_tuned(demo_data, tmp_path, name):
    from test_model import published_state
    has_positions = name == "lightning.ckpt"
    published = published_state(torch.Generator().manual_seed(0), "positions" if has_positions else "table")
    if has_positions:  # its file has them scaled, and rounded
        position = torch.from_numpy(data.read_geometry(demo_data)["position"].copy())
        published["embedding.dom_positions"][1:] = position / 500
    torch.save({"state_dict": published, "epoch": 3} if has_positions else published, tmp_path / name)
    arguments = [f"--data_dir={demo_data}", *KNOBS, f"--out_dir={tmp_path}/run", "--max_steps=1",
                 "--learning_rate=1e-12"]
    line = user_error("finetune.py", *arguments, f"--pretrained={tmp_path}/{name}")
    assert f"python -m tools.import_published --checkpoint={tmp_path}/{name}" in line
    run_ok("tools/import_published.py", f"--checkpoint={tmp_path}/{name}", f"--data_dir={demo_data}",
           "--num_heads=4", f"--out={tmp_path}/ours.pt")
    run_ok("finetune.py", *arguments, f"--pretrained={tmp_path}/ours.pt")
    tuned = weights(tmp_path / "run")
    if has_positions:
        assert torch.allclose(tuned["encoder.embedding.position.weight"],
                              published["embedding.position_embedding.weight"], atol=1e-6)
    else:
        assert torch.allclose(tuned["encoder.embedding.dom_table.weight"],
                              published["embedding.dom_embedding.weight"][1:], atol=1e-6)
    assert ("encoder.final_norm.weight" in tuned) == has_positions
    assert tuned["encoder.backbone.blocks.1.mlp.up.weight"].shape == (64, 32)


@pytest.mark.parametrize("spoil, words", [
    (lambda state: state.update({"transformer_blocks.0.attention.q_norm.weight": torch.ones(8)}), "q_norm"),
    (lambda state: state.pop("transformer_blocks.1.feed_forward.0.weight"), "mlp.up"),
    (lambda state: state["embedding.dom_positions"][78].add_(0.1), "another detector"),
    (lambda state: state.pop("transformer_blocks.0.attention.wq.weight"), "no weights of the published")])
def test_a_published_checkpoint_that_does_not_fit_is_refused(demo_data, tmp_path, spoil, words):
    from test_model import published_state
    published = published_state(torch.Generator().manual_seed(0), "positions")
    position = torch.from_numpy(data.read_geometry(demo_data)["position"].copy())
    published["embedding.dom_positions"][1:] = position / 500
    spoil(published)
    torch.save(published, tmp_path / "weights.pth")
    line = user_error("tools/import_published.py", f"--checkpoint={tmp_path}/weights.pth",
                      f"--data_dir={demo_data}", "--num_heads=4", f"--out={tmp_path}/ours.pt")
    assert words in line and "weights.pth" in line and not (tmp_path / "ours.pt").exists()
