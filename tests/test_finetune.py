"""finetune.py as users run it: from a checkpoint, from scratch, frozen, evaluation, predictions."""
import csv

import numpy as np
import pyarrow.parquet
import pytest
import torch

import common
import data
import finetune
from conftest import TINY_MODEL, TINY_RUN, run_ok, torchrun, user_error
from test_train import assert_same_weights, column, weights

KNOBS = [knob for knob in TINY_RUN if knob not in TINY_MODEL] + ["--head_hidden_size=16", "--warmup_steps=2",
                                                                 "--learning_rate=1e-3"]


@pytest.fixture(scope="module")
def tuned(demo_data, pretrained, tmp_path_factory):
    out_dir = tmp_path_factory.mktemp("tuned")
    done = run_ok("finetune.py", f"--data_dir={demo_data}", f"--out_dir={out_dir}", f"--pretrained={pretrained[0]}/ckpt.pt",
                  *KNOBS, f"--predictions={out_dir}/predictions.csv")
    return out_dir, done


def test_a_run_leaves_what_the_readme_says(tuned):
    out_dir, done = tuned
    assert {p.name for p in out_dir.iterdir()} == {"ckpt.pt", "best.pt", "log.csv", "config.json", "result.txt",
                                                   "predictions.csv"}
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


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_azimuths_stay_below_two_pi(demo_data, tmp_path, suffix):
    split, _ = data.open_first_events(demo_data, "val", 4)
    directions = np.array([[1, -1e-20, 0], [0, -1, 0], [0, 0, 1], [-1, 0, 0]], np.float32)
    finetune.write_predictions(str(tmp_path / f"p.{suffix}"), directions, split)
    table = (pyarrow.csv.read_csv if suffix == "csv" else pyarrow.parquet.read_table)(tmp_path / f"p.{suffix}")
    assert table.column_names == ["event_id", "azimuth", "zenith"]
    assert table["azimuth"].to_numpy() == pytest.approx([0, 1.5 * np.pi, 0, np.pi])
    assert table["zenith"].to_numpy() == pytest.approx([np.pi / 2, np.pi / 2, 0, np.pi / 2])


def test_the_encoder_comes_from_the_checkpoint(demo_data, pretrained, tmp_path):
    """At a learning rate of next to nothing the encoder is the pretrained one; from scratch it is another."""
    args = [f"--data_dir={demo_data}", *KNOBS, "--learning_rate=1e-12"]
    run_ok("finetune.py", *args, f"--out_dir={tmp_path}/a", f"--pretrained={pretrained[0]}/ckpt.pt")
    run_ok("finetune.py", *args, f"--out_dir={tmp_path}/b", "--pretrained=", *TINY_MODEL)
    before, loaded, scratch = weights(pretrained[0]), weights(tmp_path / "a"), weights(tmp_path / "b")
    encoder = [name for name in before if name.startswith("encoder.") and before[name].ndim == 2 and "geometry" not in name]
    assert encoder and all(torch.allclose(before[name], loaded[name], atol=1e-6) for name in encoder)
    assert not any(torch.allclose(before[name], scratch[name], atol=1e-3) for name in encoder)


def test_a_frozen_encoder_stays_and_the_head_moves(demo_data, pretrained, tmp_path):
    run_ok("finetune.py", f"--data_dir={demo_data}", *KNOBS, f"--out_dir={tmp_path}", "--freeze_backbone=True",
           f"--pretrained={pretrained[0]}/ckpt.pt", "--max_steps=4")
    before, after = weights(pretrained[0]), weights(tmp_path)
    assert all(torch.equal(before[name], after[name]) for name in after if name.startswith("encoder."))
    saved = common.load_checkpoint(tmp_path / "ckpt.pt")
    moments = saved["optimizer"]["state"]
    assert len(moments) == 4 and all(state["exp_avg_sq"].any() for state in moments.values())  # two Linear layers


def test_it_learns_direction(demo_data, tmp_path):
    """On 150 events, learned by heart: the labels, the loss and the head belong together."""
    run_ok("finetune.py", f"--data_dir={demo_data}", *KNOBS, *TINY_MODEL, f"--out_dir={tmp_path}", "--pretrained=",
           "--batch_size=50", "--max_steps=150", "--eval_interval=150", "--log_interval=50", "--save_interval=150",
           "--learning_rate=5e-3", "--val_split=finetune", "--val_events=0")
    before, after = column(tmp_path, "val_angle_mean")
    assert abs(before - np.pi / 2) < 0.25 and after < 1.0


def test_two_ranks_train_and_predict_like_one(tuned, demo_data, pretrained, tmp_path):
    run_ok("finetune.py", f"--data_dir={demo_data}", f"--out_dir={tmp_path}", f"--pretrained={pretrained[0]}/ckpt.pt", *KNOBS,
           f"--predictions={tmp_path}/predictions.csv", launcher=torchrun(2))
    for name in ("loss", "grad_norm", "val_angle_mean", "val_angle_median"):
        assert column(tmp_path, name) == pytest.approx(column(tuned[0], name), rel=2e-4), name
    assert_same_weights(tmp_path, tuned[0], atol=1e-4)
    one, two = (np.loadtxt(folder / "predictions.csv", delimiter=",", skiprows=1) for folder in (tuned[0], tmp_path))
    assert np.array_equal(one[:, 0], two[:, 0]) and np.allclose(one, two, atol=1e-3)


def test_stopped_and_resumed_equals_never_stopped(tuned, demo_data, pretrained, tmp_path):
    args = [f"--data_dir={demo_data}", f"--out_dir={tmp_path}", f"--pretrained={pretrained[0]}/ckpt.pt", *KNOBS]
    run_ok("finetune.py", *args, "--max_steps=4", "--schedule=constant")
    run_ok("finetune.py", *args, "--max_steps=6", "--schedule=constant")
    straight = [f"--data_dir={demo_data}", f"--out_dir={tmp_path}/straight", f"--pretrained={pretrained[0]}/ckpt.pt", *KNOBS]
    run_ok("finetune.py", *straight, "--schedule=constant")
    assert_same_weights(tmp_path, tmp_path / "straight")
    assert column(tmp_path, "loss") == column(tmp_path / "straight", "loss")
    assert "is complete at step 6" in run_ok("finetune.py", *args, "--schedule=constant").stdout


def test_evaluation_only_and_unlabelled_predictions(tuned, demo_data, tmp_path):
    out_dir, done = tuned
    args = [f"--data_dir={demo_data}", f"--out_dir={out_dir}", "--eval_only=True", "--device=cpu", "--dtype=float32"]
    again = run_ok("finetune.py", *args, "--val_events=50")
    assert (out_dir / "result.txt").read_text().strip() in again.stdout
    run_ok("finetune.py", *args, "--val_split=test", f"--predictions={tmp_path}/test.parquet")
    table = pyarrow.parquet.read_table(tmp_path / "test.parquet")
    assert table["event_id"].to_numpy().tolist() == data.open_split(demo_data, "test").events["event_id"].tolist()


def test_user_errors(tuned, demo_data, pretrained, tmp_path):
    args = [f"--data_dir={demo_data}", f"--out_dir={tmp_path}/run", *KNOBS]
    checkpoint = f"--pretrained={pretrained[0]}/ckpt.pt"
    line = user_error("finetune.py", *args, checkpoint, "--num_layers=3")
    assert "num_layers = 3" in line and "has 2" in line
    assert "no such checkpoint" in user_error("finetune.py", *args, "--pretrained=nowhere.pt")
    assert "have no direction" in user_error("finetune.py", *args, checkpoint, "--train_split=test", "--train_events=0")
    assert "have no direction" in user_error("finetune.py", *args, checkpoint, "--val_split=test", "--val_events=0")
    assert "must end in .csv" in user_error("finetune.py", *args, checkpoint, "--predictions=x.txt")
    assert "not a folder to write in" in user_error("finetune.py", *args, checkpoint, "--predictions=/dev/null/x.csv")
    assert "needs a pretrained" in user_error("finetune.py", *args, "--pretrained=", "--freeze_backbone=True")
    assert "no fine-tuned checkpoint" in user_error("finetune.py", *args, "--eval_only=True",
                                                    f"--checkpoint={pretrained[0]}/ckpt.pt")
    assert not (tmp_path / "run").exists()


def test_another_detector_is_refused(tuned, demo_data, pretrained, tmp_path):
    import shutil
    shutil.copytree(demo_data, tmp_path / "moved")
    geometry = data.read_geometry(demo_data)
    geometry[77, 2] += 1
    geometry.tofile(tmp_path / "moved/geometry.bin")
    line = user_error("finetune.py", f"--data_dir={tmp_path}/moved", f"--out_dir={tmp_path}/run", *KNOBS,
                      f"--pretrained={pretrained[0]}/ckpt.pt")
    assert "another detector" in line and "DOM 77" in line


@pytest.mark.parametrize("name", ["weights.pth", "lightning.ckpt"])
def test_a_published_checkpoint_can_be_tuned(demo_data, tmp_path, name):
    from test_model import published_state
    has_positions = name == "lightning.ckpt"
    published = published_state(torch.Generator().manual_seed(0), "positions" if has_positions else "table")
    if has_positions:  # its file has them scaled, and rounded
        published["embedding.dom_positions"][1:] = torch.from_numpy(data.read_geometry(demo_data) / 500)
    torch.save({"state_dict": published, "epoch": 3} if has_positions else published, tmp_path / name)
    arguments = [f"--data_dir={demo_data}", *KNOBS, f"--out_dir={tmp_path}/run", f"--pretrained={tmp_path}/{name}",
                 "--num_heads=4", "--max_steps=1", "--learning_rate=1e-12"]
    run_ok("finetune.py", *arguments)
    tuned = weights(tmp_path / "run")
    if has_positions:
        assert torch.allclose(tuned["encoder.embedding.position.weight"], published["embedding.position_embedding.weight"], atol=1e-6)
    else:
        assert torch.allclose(tuned["encoder.embedding.dom_table.weight"][:5160],
                              published["embedding.dom_embedding.weight"][1:5161], atol=1e-6)
    assert ("encoder.final_norm.weight" in tuned) == has_positions
    assert tuned["encoder.backbone.blocks.1.mlp.up.weight"].shape == (64, 32)


@pytest.mark.parametrize("spoil, words", [
    (lambda state: state.update({"transformer_blocks.0.attention.q_norm.weight": torch.ones(8)}), "q_norm"),
    (lambda state: state.pop("transformer_blocks.1.feed_forward.0.weight"), "mlp.up"),
    (lambda state: state["embedding.dom_positions"][78].add_(0.1), "another detector")])
def test_a_published_checkpoint_that_does_not_fit_is_refused(demo_data, tmp_path, spoil, words):
    from test_model import published_state
    published = published_state(torch.Generator().manual_seed(0), "positions")
    published["embedding.dom_positions"][1:] = torch.from_numpy(data.read_geometry(demo_data) / 500)
    spoil(published)
    torch.save(published, tmp_path / "weights.pth")
    line = user_error("finetune.py", f"--data_dir={demo_data}", *KNOBS, f"--out_dir={tmp_path}/run",
                      f"--pretrained={tmp_path}/weights.pth", "--num_heads=4")
    assert words in line and "weights.pth" in line
