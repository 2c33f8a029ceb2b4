"""simulate.py: Kaggle's files, bytes that follow from the options, pulses that look real."""
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pyarrow.parquet as pq
import pytest
from conftest import ROOT, run, run_ok, user_error

import simulate
from simulate import local_coincidence

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
    """All labelled events: columns of the pulses (event: a number from 0) and of the meta table."""
    pulses = read(*(raw / f"train/batch_{batch}.parquet" for batch in range(1, 8)))
    meta, dom = read(raw / "train_meta.parquet"), pulses["sensor_id"].astype(int)
    event = np.searchsorted(meta["event_id"], pulses["event_id"])
    return {**pulses, **meta, "event": event, "dom": dom, "position": POSITION[dom],
            "hlc": ~pulses["auxiliary"]}

def all_bytes(folder):
    return {str(x.relative_to(folder)): x.read_bytes() for x in folder.rglob("*") if x.is_file()}

# ---- files --------------------------------------------------------------------------------------

def test_layout_is_kaggles(raw):
    batches = [f"train/batch_{batch}.parquet" for batch in range(1, 8)] + ["test/batch_8.parquet"]
    assert set(all_bytes(raw)) == {*batches, "train_meta.parquet", "test_meta.parquet",
                                   "sensor_geometry.csv", "simulate.json"}
    for path in batches:
        schema = pq.read_schema(raw / path)
        assert schema.names == ["sensor_id", "time", "charge", "auxiliary", "event_id"]
        assert [*map(str, schema.types)] == ["int16", "int64", "double", "bool", "int64"]
        assert json.loads(schema.metadata[b"pandas"])["index_columns"] == ["event_id"]
    names = ["batch_id", "event_id", "first_pulse_index", "last_pulse_index", "azimuth", "zenith",
             "energy", "event_class"]
    for split, n_columns in (("train", 8), ("test", 4)):
        schema = pq.read_schema(raw / f"{split}_meta.parquet")
        assert schema.names == names[:n_columns] and str(schema.types[3]) == "int64"
    lines = (raw / "sensor_geometry.csv").read_text().splitlines()
    assert lines[0] == f"{HEADER},string" and len(lines) == 5161 and lines[-1].endswith(",85")

def test_meta_tables_find_every_event(raw):
    last_id = -1
    for split, first_batch, sizes in (("train", 1, [500] * 6 + [100]), ("test", 8, [100])):
        meta = read(raw / f"{split}_meta.parquet")
        batches = np.arange(len(sizes)) + first_batch
        assert meta["batch_id"].tolist() == np.repeat(batches, sizes).tolist()
        assert meta["event_id"][0] > last_id and (np.diff(meta["event_id"]) > 0).all()
        last_id = meta["event_id"][-1]
        for batch in batches:
            rows, end = np.flatnonzero(meta["batch_id"] == batch), 0
            pulses = read(raw / split / f"batch_{batch}.parquet")
            for row in rows:
                assert meta["first_pulse_index"][row] == end
                start, end = end, meta["last_pulse_index"][row] + 1
                assert (pulses["event_id"][start:end] == meta["event_id"][row]).all()
                assert (np.diff(pulses["time"][start:end]) >= 0).all()
            assert end == len(pulses["time"])

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

def start(out_dir, workers):
    """Start a simulation in a process group of its own -> Popen after its first batch."""
    command = [sys.executable, "simulate.py", f"--out_dir={out_dir}", workers, *SETTINGS]
    process = subprocess.Popen(  # pytest-xdist's workers ignore Ctrl-C, and processes inherit that
        command, cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        start_new_session=True, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    while process.poll() is None and not list(out_dir.glob(".parts/batch_?.parquet")):
        time.sleep(0.005)
    return process

def test_killed_run_resumes_to_the_same_bytes(raw, tmp_path):
    process = start(tmp_path / "raw", "--workers=1")
    process.kill()  # SIGKILL, to the main process alone
    process.communicate(timeout=20)  # until no worker holds the pipes
    first = tmp_path / "raw/train/batch_1.parquet"
    written = first.stat().st_mtime_ns
    assert not (tmp_path / "raw/test/batch_8.parquet").exists(), "it was too fast to be killed"
    run_ok("simulate.py", f"--out_dir={tmp_path}/raw", "--workers=1", *SETTINGS)
    assert all_bytes(tmp_path / "raw") == all_bytes(raw)  # with another number of workers, too
    assert first.stat().st_mtime_ns == written, "a finished batch was simulated again"

def test_ctrl_c_stops_with_one_line(tmp_path):
    process = start(tmp_path / "raw", "--workers=2")
    os.killpg(process.pid, signal.SIGINT)
    out, _ = process.communicate(timeout=20)  # python's queue thread may complain as it ends
    assert process.returncode == 130
    assert out.strip().splitlines()[-1] == "stopped; the same command resumes"

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
    assert (strings[:, :, :2] == strings[:, :1, :2]).all() and (np.diff(strings[:, :, 2]) < 0).all()
    gaps = np.linalg.norm(strings[:, None, 0, :2] - strings[:, 0, :2], axis=-1) + 1e9 * np.eye(86)
    np.testing.assert_allclose(gaps[:78, :78].min(1), 125, atol=0.1)
    assert (np.sum(gaps[:78, :78] < 126, axis=1) == 6).sum() == 50  # inner ones: six neighbours
    assert gaps[78:].min() > 30 and gaps[35, 78:].max() < 75  # DeepCore stands around string 36
    np.testing.assert_allclose(-np.diff(strings[:78, :, 2]), 17.02, atol=0.011)
    assert (np.diff(strings[78:, :, 2]) == [-10] * 9 + [-257] + [-7] * 49).all()

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

@pytest.mark.parametrize("scale, shift, n", [(1e-3, 0, 1), (1, -1948, 1), (1, 0, 7)],
                         ids=["kilometres", "depth", "too many DOMs for int16"])
def test_bad_geometry_is_refused(tmp_path, scale, shift, n):
    table = np.tile(POSITION * scale + [0, 0, shift], (n, 1))
    table = np.column_stack([np.arange(len(table)), table])
    np.savetxt(tmp_path / "g.csv", table, ["%d"] + ["%g"] * 3, ",", header=HEADER, comments="")
    assert "g.csv: " in user_error("simulate.py", f"--geometry={tmp_path}/g.csv",
                                   f"--out_dir={tmp_path}/raw", *SMALL)
    assert not (tmp_path / "raw").exists()

def test_a_detector_that_sees_nothing_is_refused(tmp_path):
    rows = [f"{i},{37 * i % 101},{i},{-17 * (i % 10)}" for i in range(60)]  # each a string
    (tmp_path / "g.csv").write_text("\n".join([HEADER, *rows]) + "\n")
    done = run("simulate.py", f"--geometry={tmp_path}/g.csv", f"--out_dir={tmp_path}/raw", *SMALL)
    assert done.returncode == 1 and done.stderr.count("error: 0 of 38528 neutrinos") == 1

# ---- physics ------------------------------------------------------------------------------------

def line_fit_error(events):
    """Fit r = r0 + v t to each event's HLC pulses, weighted by charge -> angle to the source."""
    event, clock, weight = events["event"], events["time"] - 1e4, events["charge"] * events["hlc"]
    clock = clock - (np.bincount(event, weight * clock) / np.bincount(event, weight))[event]
    fit = -np.stack([np.bincount(event, weight * clock * x) for x in events["position"].T], 1)
    azimuth, r, z = events["azimuth"], np.sin(events["zenith"]), np.cos(events["zenith"])
    source = np.stack([np.cos(azimuth) * r, np.sin(azimuth) * r, z], 1)
    return np.arccos((fit * source).sum(1) / np.linalg.norm(fit, axis=1))

def test_tracks_point_to_their_source_as_well_as_real_ones(events):
    error, is_track = line_fit_error(events), events["event_class"] == 1
    bright = is_track & (np.bincount(events["event"], events["hlc"]) > 60)
    assert bright.sum() > 50 and np.cos(error[bright]).mean() > 0.5  # -0.5 if angles were flights
    assert 0.2 < np.median(error[is_track]) < 0.6 and 1.2 < np.median(error[~is_track]) < 1.8
    assert 1.0 < error.mean() < 1.35  # 1.18 rad on Kaggle's

def test_pulse_counts_look_real_and_grow_with_energy(events):
    n_pulses = np.bincount(events["event"])
    n_hlc = np.bincount(events["event"], events["hlc"])
    assert 50 < np.median(n_pulses) < 70  # Kaggle: 62
    assert 0.09 < (n_pulses > 127).mean() < 0.18  # 0.13
    assert 28 < np.minimum(n_hlc, 127).mean() < 43  # 35
    assert 10 < n_pulses.min() < 40 and 1500 < n_pulses.max() <= 100_000  # 15, 110,517
    assert 25 < np.median(n_pulses - n_hlc) < 50 and 0.3 < np.mean(events["event_class"] == 1) < 0.6
    light = np.log10(np.bincount(events["event"], events["charge"]))
    assert np.corrcoef(light, np.log10(events["energy"]))[0, 1] > 0.4

def test_dust_layer_is_dark(events):
    z = events["position"][(events["dom"] < 78 * 60) & events["hlc"], 2]  # no DeepCore
    above, dust, below = (np.sum(np.abs(z - center) < 51) for center in (50, -102, -250))
    assert dust < 0.6 * above and dust < 0.6 * below

def test_events_have_triggered_and_aux_is_the_coincidence_of_the_written_pulses(events):
    event, when = events["event"][events["hlc"]], events["time"][events["hlc"]]
    within = (event[7:] == event[:-7]) & (when[7:] - when[:-7] <= 5000)
    assert len(np.unique(event[7:][within])) == 3100
    coincident = local_coincidence(events["event"], RUNG[events["dom"]], events["time"])
    assert not (coincident & ~events["hlc"]).any()
    # the readout window may cut off a partner, rarely
    assert (~coincident & events["hlc"]).sum() < 1e-3 * len(coincident)

@pytest.mark.parametrize("seed", range(6))
def test_local_coincidence_against_all_pairs(seed):
    rng, n = np.random.default_rng(seed), 250
    event = rng.integers(7, 10, n).astype([np.int16, np.uint16, np.int64][seed % 3])
    dom = rng.choice([*range(52, 70), 0, 1, 5158, 5159], n)  # ends of string and detector
    when = rng.choice([-3000, 0, 999, 1000, 1001, 2000, 2001, 5000, 400_000], n)  # borders, ties
    if seed >= 3:  # thin enough that about half are alone
        when = rng.uniform(5000, 60_000, n)
    distance = np.abs(dom - dom[:, None])
    pairs = (event == event[:, None]) & (dom // 60 == dom[:, None] // 60) & (distance >= 1)
    expected = (pairs & (distance <= 2) & (np.abs(when - when[:, None]) <= 1000)).any(1)
    assert 0.1 < expected.mean() < 1 and not (seed >= 3 and expected.mean() > 0.9)
    np.testing.assert_array_equal(local_coincidence(event, RUNG[dom], when), expected)

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
    first = {}
    for photon in sorted(zip(event.tolist(), dom.tolist(), when.tolist())):
        first.setdefault((*photon[:2], photon[2] // 8), photon)
    columns = (pulses[name].tolist() for name in ("event_id", "sensor_id", "time"))
    assert [*zip(*columns)] == [*first.values()]
    assert pulses["charge"].sum() == pytest.approx(n * (0.75 + 0.25 * 0.3), rel=0.05)
