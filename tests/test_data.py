"""The .bin format, the events of a step, packed micro-batches."""
import shutil

import numpy as np
import pytest
import torch

import data
import prepare
from conftest import random_events, write_folder


def test_records_are_packed_as_designed():
    assert data.PULSE.itemsize == 11 and data.EVENT.itemsize == 63 and data.GEOMETRY.itemsize == 14
    assert data.PULSE.names == ("time", "charge", "dom", "aux")
    assert data.EVENT.names == ("event_id", "start", "length", "n_pulses", "total_charge", "center",
                                "motion", "azimuth", "zenith", "energy", "event_class")


@pytest.mark.parametrize("n_events, batch_size", [(1003, 128), (64, 7), (5, 16), (8, 8)])
def test_every_epoch_holds_every_event_once(n_events, batch_size):
    steps = [data.step_events(step, batch_size, n_events, seed=3)
             for step in range(4 * n_events // batch_size + 1)]
    index, epoch = (np.concatenate(part) for part in zip(*steps))
    for e in range(3):
        assert np.array_equal(np.sort(index[epoch == e]), np.arange(n_events))
    if n_events > 100:
        assert not np.array_equal(index[epoch == 0], index[epoch == 1])
        assert not np.array_equal(index[epoch == 0], data.step_events(0, n_events, n_events, seed=4)[0])
        distant = np.abs(np.diff(index[epoch == 0])) > 1
        assert distant.mean() < 1.5 / data.GROUP_SIZE  # neighbours stay together: few reads


def test_hash_is_uniform_and_depends_on_each_argument():
    place = np.arange(200_000)
    draws = [data.uniform_hash(seed, stream, place) for seed, stream in ((0, 0), (1, 0), (0, 1), (1, 1))]
    for draw in draws:
        assert 0 <= draw.min() and draw.max() < 1
        assert np.abs(np.histogram(draw, 20, (0, 1))[0] / 10_000 - 1).max() < 0.05  # 5 standard deviations
        assert abs(np.corrcoef(draw[:-1], draw[1:])[0, 1]) < 0.015
    assert np.abs(np.corrcoef(draws) - np.eye(4)).max() < 0.015
    assert data.uniform_hash(0, 1, place[7]) == draws[2][7]


def test_events_and_pulses_come_back_whatever_the_order(tmp_path):
    rng = np.random.default_rng(0)
    events, pulses = random_events(rng, rng.integers(1, 40, 60))
    pulses["dom"][:5160 % len(pulses)] = 5159
    split = data.open_split(write_folder(tmp_path, a=(events, pulses)), "a")
    index = np.array([3, 4, 5, 59, 0, 0, 17, 18, 2])
    read, flat = data.read_events(split, index)
    assert np.array_equal(read, events[index])
    expected = [pulses[e["start"]:e["start"] + e["length"]] for e in events[index]]
    assert np.array_equal(flat, np.concatenate(expected))
    assert np.array_equal(flat, pulses[data.pulse_places(read)])


def test_records_written_in_pieces_are_the_same_bytes(tmp_path):
    events, _ = random_events(np.random.default_rng(0), [3] * 60)
    prepare.reserve(tmp_path / "x.bin", events.nbytes)
    for first in (30, 0):  # the later piece first
        prepare.write_records(tmp_path / "x.bin", first, events[first:first + 30])
    assert (tmp_path / "x.bin").read_bytes() == events.tobytes()


def test_every_dom_id_survives_to_the_tensor():
    events, pulses = random_events(np.random.default_rng(1), [100] * 52)
    pulses["dom"][:5160] = np.arange(5160)
    batches = data.micro_batches(events, pulses, 13)
    found = np.concatenate([batch["dom"].numpy() for batch in batches])
    assert np.array_equal(np.unique(found), np.arange(5160))
    assert all(batch["dom"].dtype == torch.int64 for batch in batches)


def test_micro_batches_hold_each_pulse_once_behind_the_cls_of_its_event():
    rng = np.random.default_rng(2)
    events, pulses = random_events(rng, rng.integers(1, 128, 101))
    hidden = rng.random(len(pulses)) < 0.2
    batches = data.micro_batches(events, pulses, 16, ("total_charge", "center"), hidden)
    assert max(len(batch["row"]) for batch in batches) <= 16
    assert sorted(np.concatenate([batch["row"] for batch in batches])) == list(range(101))
    for batch in batches:
        starts = batch["starts"].tolist()
        assert batch["starts"].dtype == torch.int32 and starts[0] == 0 and starts[-1] == len(batch["time"])
        assert batch["longest"] == max(np.diff(starts)) and list(np.diff(starts)) == sorted(np.diff(starts))
        is_hidden = torch.zeros(len(batch["time"]), dtype=torch.bool)
        is_hidden[batch["hidden"]] = True
        n_hidden = []
        for i, row in enumerate(batch["row"].tolist()):
            e = events[row]
            cls, span = starts[i], slice(starts[i] + 1, starts[i + 1])
            on_disk = slice(e["start"], e["start"] + e["length"])
            assert batch["total_charge"][i] == e["total_charge"] and batch["event_id"][i] == e["event_id"]
            assert np.array_equal(batch["center"][i], e["center"])
            for name in ("time", "charge", "dom", "aux"):
                assert np.array_equal(batch[name][span].numpy(), pulses[name][on_disk]), name
                assert batch[name][cls] == 0, "[CLS] has no values"
            assert np.array_equal(is_hidden[span].numpy(), hidden[on_disk]) and not is_hidden[cls]
            n_hidden.append(np.count_nonzero(hidden[on_disk]))
        assert torch.bincount(batch["hidden_event"], minlength=len(n_hidden)).tolist() == n_hidden
        assert (batch["n_scored"], batch["n_hidden"]) == (np.count_nonzero(n_hidden), sum(n_hidden))


def test_labels_are_taken_along_only_if_named():
    events, pulses = random_events(np.random.default_rng(3), [3, 4])
    batch, = data.micro_batches(events, pulses, 5, ("azimuth",))
    assert "azimuth" in batch and not {"zenith", "center", "hidden", "n_hidden"} & batch.keys()
    assert [len(batch["row"]) for batch in data.micro_batches(events, pulses, 1)] == [1, 1]


def test_prefetch_keeps_the_order_and_passes_errors_on():
    def load(step):
        if step == 5:
            raise SystemExit("error: step 5")
        return [{"step": torch.tensor(step)}]
    loader = data.prefetch(load, range(10), torch.device("cpu"))
    assert [next(loader)[0]["step"].item() for _ in range(5)] == [0, 1, 2, 3, 4]
    with pytest.raises(SystemExit, match="step 5"):
        next(loader)


def damage(folder, name, text):
    (folder / name).write_text(text)


@pytest.mark.parametrize("harm, split, words", [
    (lambda f: shutil.rmtree(f), "val", "no such data folder"),
    (lambda f: (f / "meta.json").unlink(), "val", "no folder that prepare.py made"),
    (lambda f: (f / "unfinished").mkdir() or damage(f, "unfinished/settings.json",
                                                    '{"command": "python prepare.py x.py"}')
     or (f / "meta.json").unlink(), "val", "to go on, run: python prepare.py x.py"),
    (lambda f: damage(f, "meta.json", "[]"), "val", "format None, need"),
    (lambda f: (f / "val_events.bin").write_bytes(bytes((f / "val_events.bin").stat().st_size)), "val",
     "does not fit"),
    (lambda f: damage(f, "meta.json", "{"), "val", "not valid JSON"),
    (lambda f: damage(f, "meta.json", '{"format": 99, "splits": {}}'), "val", "format 99, need"),
    (lambda f: damage(f, "val_pulses.bin", "short"), "val", "5 bytes, meta.json says"),
    (lambda f: (f / "val_events.bin").unlink(), "val", "0 bytes, meta.json says"),
    (lambda f: None, "vla", "no split 'vla', it has: pretrain, finetune, val, test"),
])
def test_damaged_folders_are_refused(demo_data, tmp_path, harm, split, words):
    shutil.copytree(demo_data, tmp_path / "copy")
    harm(tmp_path / "copy")
    with pytest.raises(SystemExit) as stop:
        data.open_split(tmp_path / "copy", split)
    assert words in str(stop.value) and "copy" in str(stop.value)


def test_a_dom_that_the_detector_lacks_is_refused(demo_data, tmp_path):
    folder = tmp_path / "demo"
    shutil.copytree(demo_data, folder)
    with open(folder / "val_pulses.bin", "r+b") as file:
        file.write(b"\xff" * 500)
    split = data.open_split(folder, "val")
    with pytest.raises(SystemExit, match="val_pulses.bin: it has DOM 65535, the detector has 5160"):
        data.read_events(split, np.arange(3))


def test_damaged_geometry_is_refused(demo_data, tmp_path):
    shutil.copytree(demo_data, tmp_path / "copy")
    (tmp_path / "copy/geometry.bin").write_bytes(b"\0" * 8)
    with pytest.raises(SystemExit, match="geometry.bin: 8 bytes, meta.json says 72240"):
        data.read_geometry(tmp_path / "copy")


def test_asking_for_more_events_than_there_are(demo_data):
    with pytest.raises(SystemExit, match="holds 103 events, the config asks for train_events = 104"):
        data.open_first_events(demo_data, "val", 104)
    assert data.open_first_events(demo_data, "val", 0)[1] == 103


def test_a_missing_folder_is_named_in_full_with_the_command_that_makes_it(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        data.read_meta("data/study")
    assert f"{tmp_path}/data/study: no such" in str(stop.value)
    assert str(stop.value).endswith("python prepare.py sample_config/study/prepare.py")
