"""simulate.py: Kaggle's files, bytes that follow from the options, pulses that look real."""
import os
import signal

import numpy as np
import pyarrow.parquet as pq
import pytest
from conftest import run_ok, start, user_error, wait_until

import simulate

SETTINGS = ["--n_events=3100", "--events_per_batch=500", "--n_test_events=100", "--seed=3"]
SMALL = ["--n_events=70", "--events_per_batch=40", "--n_test_events=0", "--workers=1"]
POSITION = simulate.build_geometry()
RUNG = simulate.number_along_strings(POSITION, np.arange(5160) // 60)
HEADER = "sensor_id,x,y,z"

@pytest.fixture(scope="session")
def raw(tmp_path_factory):
    """A folder simulated in one go by two workers; tests only read it."""
    out_dir = tmp_path_factory.mktemp("raw") / "raw"
    run_ok("simulate.py", f"--out_dir={out_dir}", "--workers=2", *SETTINGS)
    return out_dir

def read(*paths):
    table = pq.read_table([*paths])
    return {name: table[name].to_numpy() for name in table.column_names}

@pytest.fixture(scope="session")
def events(raw):
    """All labelled events: columns of pulses (event: a number from 0) and meta table."""
    pulses = read(*(raw / f"train/batch_{batch}.parquet" for batch in range(1, 8)))
    meta, dom = read(raw / "train_meta.parquet"), pulses["sensor_id"].astype(int)
    event = np.searchsorted(meta["event_id"], pulses["event_id"])
    return {**pulses, **meta, "event": event, "dom": dom, "position": POSITION[dom],
            "hlc": ~pulses["auxiliary"]}

def all_bytes(folder):
    return {str(x.relative_to(folder)): x.read_bytes() for x in folder.rglob("*") if x.is_file()}

# ---- files --------------------------------------------------------------------------------------

def test_layout_is_kaggles(raw):
    pulses = "sensor_id int16, time int64, charge double, auxiliary bool, event_id int64"
    meta = "batch_id int64, event_id int64, first_pulse_index int64, last_pulse_index int64"
    labels = "azimuth double, zenith double, energy double, event_class uint8"
    columns = {f"train/batch_{batch}.parquet": pulses for batch in range(1, 8)}
    columns |= {"test/batch_8.parquet": pulses, "test_meta.parquet": meta,
                "train_meta.parquet": f"{meta}, {labels}"}
    assert all_bytes(raw).keys() == {*columns, "sensor_geometry.csv", "simulate.json"}
    for path, expected in columns.items():
        schema = pq.read_schema(raw / path)
        assert ", ".join(f"{x.name} {x.type}" for x in schema) == expected
    lines = (raw / "sensor_geometry.csv").read_text().splitlines()
    assert lines[0] == f"{HEADER},string" and len(lines) == 5161 and lines[-1].endswith(",85")

def test_meta_tables_find_every_event(raw):
    ids, names = [], ("event_id", "first_pulse_index", "last_pulse_index")
    for split, batches in (("train", range(1, 8)), ("test", [8])):
        meta = read(raw / f"{split}_meta.parquet")
        for batch in batches:
            pulses = read(raw / split / f"batch_{batch}.parquet")
            rows = meta["batch_id"] == batch
            event_id, first, last = (meta[name][rows] for name in names)
            assert len(event_id) == (500 if batch < 7 else 100)
            assert first[0] == 0 and np.array_equal(first[1:], last[:-1] + 1)
            assert np.array_equal(np.repeat(event_id, last - first + 1), pulses["event_id"])
            is_same_event = np.diff(pulses["event_id"]) == 0
            assert (np.diff(pulses["time"])[is_same_event] >= 0).all()
            ids.extend(event_id)
    assert (np.diff(ids) > 0).all()

def test_values_are_in_kaggles_range(events):
    assert events["dom"].min() >= 0 and len(np.unique(events["dom"])) > 5000
    assert 5700 <= events["time"].min() < 6500 and 15_000 < events["time"].max() < 122_000
    steps = (events["charge"] - 0.025) / 0.05
    assert events["charge"].min() == 0.025 and np.abs(steps - np.round(steps)).max() < 1e-6
    assert 0 <= events["azimuth"].min() and events["azimuth"].max() < 2 * np.pi
    assert abs(np.cos(events["zenith"]).mean()) < 0.1  # directions cover the sphere
    assert 100 <= events["energy"].min() and events["energy"].max() > 3e4
    assert set(events["event_class"]) == {1, 2} and len(np.unique(events["azimuth"])) == 3100

# ---- same options, same bytes -------------------------------------------------------------------

def test_stopped_or_killed_it_resumes_to_the_same_bytes(raw, tmp_path):
    out_dir = tmp_path / "raw"
    args = ["simulate.py", f"--out_dir={out_dir}", "--workers=1", *SETTINGS]
    for n, number, status in ((1, signal.SIGINT, 130), (2, signal.SIGKILL, -9)):
        process = start(*args)
        wait_until(lambda: len([*out_dir.glob(".parts/batch_?.parquet")]) >= n, process)
        os.kill(process.pid if status < 0 else -process.pid, number)  # -: the whole group
        output, _ = process.communicate(timeout=20)  # until no worker holds the pipe
        assert process.returncode == status and (status < 0 or "stopped; the same" in output)
    first = out_dir / "train/batch_1.parquet"
    written = first.stat().st_mtime_ns
    run_ok(*args)
    assert all_bytes(out_dir) == all_bytes(raw)  # with another number of workers, too
    assert first.stat().st_mtime_ns == written, "a finished batch was simulated again"

def test_complete_folder_is_left_alone_and_others_are_refused(events, tmp_path):
    out_dir, record = f"--out_dir={tmp_path}/raw", tmp_path / "raw/simulate.json"
    run_ok("simulate.py", out_dir, *SMALL)
    azimuth = read(tmp_path / "raw/train_meta.parquet")["azimuth"]
    assert len(azimuth) == 70 and not np.isin(azimuth, events["azimuth"]).any()  # another seed
    before = all_bytes(tmp_path / "raw")
    assert "complete" in run_ok("simulate.py", out_dir, *SMALL, "--workers=2").stdout
    assert "n_events was 70;" in user_error("simulate.py", out_dir, *SMALL, "--n_events=71")
    assert all_bytes(tmp_path / "raw") == before
    record.write_text(record.read_text().replace('"3.5"', '"1.0"'))  # as if edited since
    assert "DUST_DIRT was 1.0;" in user_error("simulate.py", out_dir, *SMALL)
    record.unlink()  # might be the real data
    assert "did not write" in user_error("simulate.py", out_dir, *SMALL)

# ---- geometry -----------------------------------------------------------------------------------

def test_built_in_geometry_is_icecubes():
    strings = POSITION.reshape(86, 60, 3)
    steps = np.diff(strings, axis=1)
    assert not steps[:, :, :2].any()
    np.testing.assert_allclose(steps[:78, :, 2], -17.02, atol=0.011)
    assert (steps[78:, :, 2] == [-10] * 9 + [-257] + [-7] * 49).all()
    gaps = np.linalg.norm(strings[:, None, 0, :2] - strings[:, 0, :2], axis=-1)
    gaps += 1e9 * np.eye(86)
    regular = gaps[:78, :78]
    np.testing.assert_allclose(regular.min(1), 125, atol=0.1)
    assert np.sum(np.sum(regular < 126, axis=1) == 6) == 50  # inner ones: six neighbours
    assert gaps[78:].min() > 30 and gaps[35, 78:].max() < 75  # DeepCore is around string 36

def test_any_detector_is_simulated(tmp_path):
    """Strings of 5 to 11 DOMs, 95 in all: whatever counts 5160, 60 or 6 would fail."""
    rows, args = [], [f"--out_dir={tmp_path}/raw", *SMALL]
    for string, length in enumerate([11, 5, 8, 9, 10, 11, 8, 7, 9, 9, 8]):
        x, y = 90 * (string % 4) - 135, 90 * (string // 4) - 90
        rows += [[len(rows) + i, x, y, 120 - 25 * i, string] for i in range(length)]
    np.savetxt(tmp_path / "g.csv", rows[::-1], "%d", ",", header=f"{HEADER},string", comments="")
    run_ok("simulate.py", *args, f"--geometry={tmp_path}/g.csv")
    written = np.loadtxt(tmp_path / "raw/sensor_geometry.csv", delimiter=",", skiprows=1)
    np.testing.assert_array_equal(written, rows)
    pulses = read(tmp_path / "raw/train/batch_1.parquet")
    assert 80 < len(np.unique(pulses["sensor_id"][~pulses["auxiliary"]])) <= 95
    assert "geometry was" in user_error("simulate.py", *args)

# ---- physics ------------------------------------------------------------------------------------

def test_tracks_point_to_their_source_as_well_as_real_ones(events):
    """By a line r + v t fitted to each event's HLC pulses, weighted by charge."""
    event, time = events["event"], events["time"]
    weight = events["charge"] * events["hlc"]
    mean_time = np.bincount(event, weight * time) / np.bincount(event, weight)
    lever = weight * (mean_time[event] - time)
    fit = np.stack([np.bincount(event, lever * x) for x in events["position"].T])
    azimuth, zenith = events["azimuth"], events["zenith"]
    x, y = np.cos(azimuth) * np.sin(zenith), np.sin(azimuth) * np.sin(zenith)
    source = np.stack([x, y, np.cos(zenith)])
    error = np.arccos((fit * source).sum(0) / np.linalg.norm(fit, axis=0))
    is_track = events["event_class"] == 1
    bright = is_track & (np.bincount(event, events["hlc"]) > 60)
    assert bright.sum() > 50 and np.cos(error[bright]).mean() > 0.5  # -0.5 if angles were flights
    assert 0.2 < np.median(error[is_track]) < 0.6 and 1.2 < np.median(error[~is_track]) < 1.8
    assert 1.0 < error.mean() < 1.35  # 1.18 rad on Kaggle's

def test_statistics_are_near_kaggles(events, raw, capsys):
    for name, *kaggle in (("charge", 2.28, 1.02, 8.8), ("time", 12_460, 11_904, 3291)):
        x = events[name]
        toy = x.mean(), np.median(x), x.std()
        assert np.abs(np.divide(toy, kaggle) - 1).max() < 0.3, name  # 10,000 events: 0.2
    n_pulses = np.bincount(events["event"])
    assert 50 < np.median(n_pulses) < 70 and 1500 < n_pulses.max() <= 100_000  # Kaggle: 62, 110,517
    assert 0.09 < (n_pulses > 127).mean() < 0.18  # 0.13
    light = np.log10(np.bincount(events["event"], events["charge"]))
    assert np.corrcoef(light, np.log10(events["energy"]))[0, 1] > 0.4
    unlit = np.bincount(events["dom"], minlength=5160) == 0
    assert 0.01 < unlit.mean() < 0.04  # dead
    simulate.print_statistics(raw / "train/batch_1.parquet")
    assert f"{read(raw / 'train/batch_1.parquet')['charge'].mean():7.5g} (2.28)" in \
        capsys.readouterr().out

def test_events_have_triggered_and_hlc_pulses_have_a_partner(events):
    hlc, rung = events["hlc"], RUNG[events["dom"]]
    event, when = events["event"][hlc], events["time"][hlc]
    n = simulate.TRIGGER_PULSES - 1
    within = (event[n:] == event[:-n]) & (when[n:] - when[:-n] <= 5000)
    assert len(np.unique(event[n:][within])) == 3100
    coincident = simulate.local_coincidence(events["event"], rung, events["time"])
    assert not (coincident & ~hlc).any()
    lost = hlc & ~coincident  # the readout window cut off the partner
    assert lost.mean() < 1e-3

@pytest.mark.parametrize("dtype", [np.int16, np.uint16, np.int64])
@pytest.mark.parametrize("is_dense", [False, True])
def test_local_coincidence_against_all_pairs(is_dense, dtype):
    rng, n = np.random.default_rng(0), 250
    event = rng.integers(7, 10, n).astype(dtype)
    dom = rng.choice([*range(52, 70), 0, 1, 5158, 5159], n)  # ends of string and detector
    when = rng.uniform(5000, 60_000, n)  # about half are alone
    if is_dense:  # borders, ties
        when = rng.choice([-3000, 0, 999, 1000, 1001, 2000, 2001, 5000, 400_000], n)
    distance = np.abs(dom - dom[:, None])
    pairs = (event == event[:, None]) & (dom // 60 == dom[:, None] // 60)
    pairs &= (distance >= 1) & (distance <= 2) & (np.abs(when - when[:, None]) <= 1000)
    found = simulate.local_coincidence(event, RUNG[dom], when)
    assert 0.1 < found.mean() < 1 and np.array_equal(found, pairs.any(1))

@pytest.mark.parametrize("is_line", [False, True], ids=["point", "line"])
def test_pairs_in_reach_are_all_that_see_light(is_line):
    doms, volume, _, _ = simulate.describe_detector(POSITION, np.arange(5160) // 60)
    _, vertex, flight, _ = simulate.draw_neutrinos(20, volume, np.random.default_rng(0))
    source = vertex, flight, is_line, np.full(20, 1e7)
    event, dom, way2, along = simulate.pairs_in_reach(*source, doms)
    way = doms[:, None] - vertex[:, :, None]  # (3, 20, 5160)
    all_way2, all_along = (way ** 2).sum(0), (way * flight[:, :, None]).sum(0)
    np.testing.assert_allclose(way2, all_way2[event, dom])
    np.testing.assert_allclose(along, all_along[event, dom], atol=1e-9)
    light = simulate.light(np.sqrt(all_way2 - is_line * all_along ** 2), 0.55, is_line)
    light[event, dom] = 0
    assert light.max() * simulate.DOM_AREA * 1e7 < simulate.MIN_EXPECTED and len(event) < 9e4

def test_pulses_are_the_first_photons_of_their_bins(monkeypatch):
    monkeypatch.setattr(simulate, "TIME_JITTER", 0.0)
    rng, n = np.random.default_rng(0), 3000
    event, dom, when = rng.integers(0, 3, n), rng.integers(0, 10, n), rng.integers(-300, 300, n)
    pulses = simulate.make_pulses(event, dom, when, np.ones(n), RUNG[:10], rng)
    photons = sorted(zip(event.tolist(), dom.tolist(), when.tolist()), reverse=True)
    bin_of = lambda e, d, t: ((e * 10 + d) * 2**32 + 2**31 + t) // simulate.MERGE_TIME
    first = {(e, d, bin_of(e, d, t)): t for e, d, t in photons}
    columns = (pulses[name].tolist() for name in ("event_id", "sensor_id", "time"))
    assert [*zip(*columns)] == sorted((*key[:2], time) for key, time in first.items())
    assert pulses["charge"].sum() == pytest.approx(n * (0.75 + 0.25 * 0.3), rel=0.05)
