"""data.py: the .bin format, the events of a step, masks, packed micro-batches."""
import numpy as np
import pytest
import torch

import data
from conftest import random_events, write_folder

equal = np.array_equal

def test_records_are_packed_as_designed():
    dtypes = data.GEOMETRY, data.PULSE, data.EVENT
    assert [dtype.itemsize for dtype in dtypes] == [14, 11, 63]
    assert data.PULSE.names == ("time", "charge", "dom", "aux")
    assert data.EVENT.names == ("event_id", "start", "length", "n_pulses", "total_charge", "center",
                                "line_fit", "azimuth", "zenith", "energy", "event_class")

# ---- which events make up a step ----------------------------------------------------------------

@pytest.mark.parametrize("n_events, batch_size", [(1003, 128), (64, 7), (5, 16), (8, 8)])
def test_every_epoch_holds_every_event_once(n_events, batch_size):
    steps = [data.step_events(step, batch_size, n_events, seed=3)
             for step in range(4 * n_events // batch_size + 1)]
    index, epoch = (np.concatenate(part) for part in zip(*steps))
    for e in range(3):
        assert equal(np.sort(index[epoch == e]), np.arange(n_events))
    if n_events > 100:
        first, other_seed = index[epoch == 0], data.step_events(0, n_events, n_events, 4)[0]
        assert not equal(first, index[epoch == 1]) and not equal(first, other_seed)
        distant = np.abs(np.diff(first)) > 1
        assert distant.mean() < 1.5 / data.GROUP_SIZE  # neighbours stay together: few reads

def test_hash_is_uniform_and_depends_on_each_argument():
    place = np.arange(200_000)
    draws = [data.uniform_hash(seed, 0 * place + key, place)
             for seed, key in ((0, 0), (1, 0), (0, 1), (1, 1))]
    for draw in draws:
        assert 0 <= draw.min() and draw.max() < 1
        counts = np.histogram(draw, 20, (0, 1))[0]
        assert np.abs(counts / 10_000 - 1).max() < 0.05  # 5 standard deviations
        assert abs(np.corrcoef(draw[:-1], draw[1:])[0, 1]) < 0.015
    assert np.abs(np.corrcoef(draws) - np.eye(4)).max() < 0.015

# ---- reading ------------------------------------------------------------------------------------

def test_events_and_pulses_come_back_whatever_the_order(tmp_path):
    rng = np.random.default_rng(0)
    events, pulses = random_events(rng, rng.integers(1, 40, 60))
    split = data.open_split(write_folder(tmp_path, a=(events, pulses)), "a")
    for index in ([3, 4, 5, 59, 0, 0, 17, 18, 2], [59], range(60), rng.permutation(60)):
        index = np.array(index)
        my_events, my_pulses = data.read_events(split, index)
        slow = [pulses[e["start"]:e["start"] + e["length"]] for e in events[index]]
        assert equal(my_events, events[index]) and equal(my_pulses, np.concatenate(slow))

def test_a_split_or_its_first_n_events(tmp_path, capsys):
    write_folder(tmp_path, a=random_events(np.random.default_rng(0), [3] * 20))
    for n_events, n_expected in ((7, 7), (0, 20), (21, 20)):
        assert len(data.open_split(tmp_path, "a", n_events).events) == n_expected
    assert "/a has only 20 events" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        data.open_split(tmp_path / "none", "a")
    assert "none/meta.json: no such file" in capsys.readouterr().err

@pytest.mark.parametrize("name, harm, words", [
    ("meta.json", lambda x: x.replace(b"<f4", b"<f2"), "meta.json: damaged, or of another version"),
    ("meta.json", lambda x: x.replace(b"val", b"vla"), "meta.json: damaged"),
    ("val_pulses.bin", lambda x: x + b"more", "val_pulses.bin: it has changed"),
    ("val_pulses.bin", lambda x: b"\xff" * len(x), "val_*.bin: damaged"),
    ("val_pulses.bin", lambda x: bytes(1650) + x[1650:], "val_*.bin: damaged"),
    ("val_pulses.bin", lambda x: x[22:33] + x[11:22] + x[:11] + x[33:], "val_*.bin: damaged"),
    ("val_events.bin", lambda x: x[63:] + x[-63:], "val_*.bin: damaged"),
    ("geometry.bin", lambda x: bytes(14) + x[14:], "geometry.bin: it has changed"),
    ("val_events.bin", lambda x: bytes(4096) + x[4096:], "val_*.bin: damaged")])
def test_damaged_folders_are_refused(tmp_path, capsys, name, harm, words):
    rng = np.random.default_rng(0)
    write_folder(tmp_path, val=random_events(rng, [3] * 100))
    path = tmp_path / name
    path.write_bytes(harm(path.read_bytes()))
    with pytest.raises(SystemExit):
        split = data.open_split(tmp_path, "val")
        data.read_events(split, rng.permutation(100))
    error = capsys.readouterr().err
    assert words in error and str(tmp_path) in error

# ---- masks --------------------------------------------------------------------------------------

STRING = np.repeat([0, 1, 2, 700], 3)  # of 12 DOMs

def masked_events(mask_prob=0.25, unit="pulse", epoch=0, seed=0, n=4000, begin=0):
    """Return events and pulses from event `begin` on, and their mask."""
    lengths = np.random.default_rng(1).integers(1, 60, n)
    events, pulses = random_events(np.random.default_rng(0), lengths, n_doms=12)
    events, pulses = events[begin:], pulses[events["start"][begin]:]
    epoch = np.full(len(events), epoch)
    return events, pulses, data.draw_mask(events, pulses, STRING, epoch, mask_prob, unit, seed)

@pytest.mark.parametrize("mask_prob", [0.01, 0.25, 0.9])
def test_only_hlc_pulses_are_masked_and_one_in_each_event_that_has_one(mask_prob):
    events, pulses, mask = masked_events(mask_prob)
    assert not (mask & pulses["aux"]).any()
    owner = np.repeat(np.arange(len(events)), events["length"])
    n_hlc = np.bincount(owner, ~pulses["aux"], len(events))
    n_masked = np.bincount(owner, mask, len(events))
    assert equal(n_masked > 0, n_hlc > 0) and (n_hlc == 0).any()

def test_the_mask_is_its_slow_form():
    events, pulses, mask = masked_events(mask_prob=0.1, epoch=2, n=500)
    for event in events:
        places = np.arange(event["start"], event["start"] + event["length"])
        number = data.uniform_hash(0, np.full(len(places), 2), places)
        number[pulses["aux"][places]] = 2
        slow = number < max(0.1, np.nextafter(number.min(), 1))
        assert equal(mask[places], slow & (number < 1))

@pytest.mark.parametrize("unit", ["pulse", "dom", "string"])
def test_masks_depend_on_seed_and_epoch_and_not_on_the_company(unit):
    _, pulses, mask = masked_events(unit=unit)
    assert not equal(mask, masked_events(unit=unit, epoch=1)[2])
    assert not equal(mask, masked_events(unit=unit, seed=1)[2])
    _, half, alone = masked_events(unit=unit, begin=2000)
    assert equal(alone, mask[-len(half):])

@pytest.mark.parametrize("unit", ["dom", "string"])
def test_a_dom_or_a_string_is_masked_as_a_whole_or_not_at_all(unit):
    events, pulses, mask = masked_events(unit=unit)
    key = np.repeat(np.arange(4000), events["length"]) * 2**16
    key = (key + (pulses["dom"] if unit == "dom" else STRING[pulses["dom"]]))[~pulses["aux"]]
    key, place, n_hlc = np.unique(key, return_inverse=True, return_counts=True)
    event, masked = key // 2**16, np.bincount(place, mask[~pulses["aux"]]) / n_hlc
    assert np.isin(masked, [0, 1]).all() and not mask[pulses["aux"]].any()
    n_units, n_masked = np.bincount(event), np.bincount(event, masked)
    assert equal(n_masked > 0, n_units > 0)
    most = n_units.max()  # of k units at least one: adds (3/4)^k / k to their share
    share = n_masked[n_units == most].mean() / most
    assert share == pytest.approx(0.25 + 0.75 ** most / most, abs=0.02)

def test_of_two_units_each_event_takes_one():
    begin = masked_events()[0]["start"]
    masks = {unit: masked_events(unit=unit)[2] for unit in ("pulse", "string", "pulse+string")}
    same = {unit: np.logical_and.reduceat(masks[unit] == masks["pulse+string"], begin)
            for unit in ("pulse", "string")}
    assert (same["pulse"] | same["string"]).all()
    assert 0.4 < same["pulse"].mean() < 0.7 and 0.4 < same["string"].mean() < 0.7

# ---- micro-batches ------------------------------------------------------------------------------

def test_every_dom_id_survives_to_the_tensor():
    events, pulses = random_events(np.random.default_rng(1), [100] * 52)
    pulses["dom"][:5160] = np.arange(5160)
    batches = data.micro_batches(events, pulses, 13)
    ids = torch.cat([batch["dom"] for batch in batches])
    assert ids.dtype == torch.int64 and ids.unique().tolist() == list(range(5160))

def test_micro_batches_hold_each_pulse_once_behind_the_cls_of_its_event():
    rng = np.random.default_rng(2)
    events, pulses = random_events(rng, rng.integers(1, 128, 101))
    mask = rng.random(len(pulses)) < 0.2
    batches = data.micro_batches(events, pulses, 16, ("total_charge", "center"), mask)
    assert max(len(batch["row"]) for batch in batches) <= 16
    assert sorted(np.concatenate([batch["row"] for batch in batches])) == list(range(101))
    for batch in batches:
        mine = events[batch["row"]]
        on_disk = [slice(e["start"], e["start"] + e["length"]) for e in mine]
        lengths = (mine["length"] + 1).tolist()
        assert lengths == sorted(lengths) and lengths[-1] == batch["max_seqlen"]
        assert batch["cu_seqlens"].tolist() == [0, *np.cumsum(lengths)]
        for name in ("time", "charge", "dom", "aux"):  # 0 at [CLS]
            tokens = [np.append(0, pulses[name][place]) for place in on_disk]
            assert equal(batch[name], np.concatenate(tokens)), name
        for name in ("total_charge", "center"):
            assert equal(batch[name], mine[name])
        assert not {"azimuth", "zenith", "energy"} & batch.keys()  # labels, only if named
        is_masked = np.concatenate([np.append(False, mask[place]) for place in on_disk])
        owner = np.repeat(np.arange(len(mine)), lengths)[is_masked]
        assert equal(batch["masked"], np.flatnonzero(is_masked))
        assert equal(batch["masked_event"], owner) and batch["n_masked_events"] == len(set(owner))

def test_prefetch_keeps_the_order_and_passes_errors_on():
    def load(step):
        if step == 5:
            raise SystemExit("error: step 5")
        return [{"step": torch.tensor(step)}]
    loader = data.prefetch(load, range(10), torch.device("cpu"))
    assert [next(loader)[0]["step"].item() for _ in range(5)] == [0, 1, 2, 3, 4]
    with pytest.raises(SystemExit, match="step 5"):
        next(loader)
