"""simulate.py: Kaggle's files, bytes that depend on the settings alone, pulses that look and point right."""
import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import data
import simulate
from conftest import ROOT, TINY_RUN, hear_ctrl_c, run_ok, user_error
from simulate import local_coincidence

SETTINGS = ["--n_events=3100", "--events_per_batch=500", "--n_test_events=100", "--seed=3"]
SMALL = ["--n_events=70", "--events_per_batch=40", "--n_test_events=0"]


@pytest.fixture(scope="session")
def demo(tmp_path_factory):
    """A folder simulated in one go by two workers; tests only read it."""
    out_dir = tmp_path_factory.mktemp("raw") / "demo"
    run_ok("simulate.py", f"--out_dir={out_dir}", "--workers=2", *SETTINGS)
    return out_dir


@pytest.fixture(scope="session")
def events(demo):
    """All labelled events: columns of their pulses (event is a number from 0), columns of the meta table."""
    pulses = pa.concat_tables([pq.read_table(demo / f"train/batch_{batch}.parquet") for batch in range(1, 8)])
    pulses = {name: pulses[name].to_numpy() for name in pulses.column_names}
    meta = pq.read_table(demo / "train_meta.parquet")
    meta = {name: meta[name].to_numpy() for name in meta.column_names}
    geometry = np.loadtxt(demo / "sensor_geometry.csv", delimiter=",", skiprows=1)[:, 1:4]
    return dict(event=np.searchsorted(meta["event_id"], pulses["event_id"]),
                dom=pulses["sensor_id"].astype(int), position=geometry[pulses["sensor_id"]],
                time=pulses["time"], charge=pulses["charge"], aux=pulses["auxiliary"],
                n=len(meta["event_id"]), **meta)


def all_bytes(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in Path(folder).rglob("*")
            if path.is_file()}


# ------------------------------------------------------------------------------------------------------------
# files
# ------------------------------------------------------------------------------------------------------------

def test_layout_is_kaggles(demo):
    expected = [f"train/batch_{batch}.parquet" for batch in range(1, 8)]
    expected += ["test/batch_8.parquet", "train_meta.parquet", "test_meta.parquet", "sensor_geometry.csv"]
    assert set(all_bytes(demo)) == {*expected, "simulate.json"}
    for path in expected[:8]:
        schema = pq.read_schema(demo / path)
        assert schema.names == ["sensor_id", "time", "charge", "auxiliary", "event_id"]
        assert list(map(str, schema.types)) == ["int16", "int64", "double", "bool", "int64"]
        assert json.loads(schema.metadata[b"pandas"])["index_columns"] == ["event_id"]
    columns = [("batch_id", "int64"), ("event_id", "int64"), ("first_pulse_index", "int64"),
               ("last_pulse_index", "int64"), ("azimuth", "double"), ("zenith", "double"),
               ("energy", "double"), ("event_class", "uint8")]
    for split, n_columns in (("train", 8), ("test", 4)):
        schema = pq.read_schema(demo / f"{split}_meta.parquet")
        assert list(zip(schema.names, map(str, schema.types))) == columns[:n_columns]
    lines = (demo / "sensor_geometry.csv").read_text().splitlines()
    assert lines[0] == "sensor_id,x,y,z,string" and len(lines) == 5161
    assert lines[-1].startswith("5159,") and lines[-1].endswith(",85")


@pytest.mark.parametrize("split, sizes", [("train", [500] * 6 + [100]), ("test", [100])])
def test_meta_table_finds_every_event(demo, split, sizes):
    meta = pq.read_table(demo / f"{split}_meta.parquet").to_pydict()
    first_batch = {"train": 1, "test": 8}[split]
    assert meta["batch_id"] == [first_batch + i for i, size in enumerate(sizes) for _ in range(size)]
    for batch in range(first_batch, first_batch + len(sizes)):
        pulses = pq.read_table(demo / split / f"batch_{batch}.parquet")
        event_id, pulse_time = pulses["event_id"].to_numpy(), pulses["time"].to_numpy()
        rows = [i for i, of in enumerate(meta["batch_id"]) if of == batch]
        at = 0
        for i in rows:
            first, last = meta["first_pulse_index"][i], meta["last_pulse_index"][i]
            assert first == at and (event_id[first:last + 1] == meta["event_id"][i]).all()
            assert (np.diff(pulse_time[first:last + 1]) >= 0).all()
            at = last + 1
        assert at == len(event_id)


def test_event_ids_grow_over_all_files(demo):
    ids = [pq.read_table(demo / f"{split}_meta.parquet")["event_id"].to_numpy()
           for split in ("train", "test")]
    steps = np.diff(np.concatenate(ids))
    assert len(steps) == 3199 and steps.min() > 0 and len(np.unique(steps)) > 5


def test_values_are_in_kaggles_range(events):
    assert events["dom"].min() >= 0 and events["dom"].max() < 5160 and len(np.unique(events["dom"])) > 5000
    assert 5700 <= events["time"].min() < 6500 and 15_000 < events["time"].max() < 122_000
    steps = (events["charge"] - 0.025) / 0.05
    assert events["charge"].min() == 0.025 and np.abs(steps - np.round(steps)).max() < 1e-6
    assert 0 <= events["azimuth"].min() and events["azimuth"].max() < 2 * np.pi
    assert 0 <= events["zenith"].min() and events["zenith"].max() <= np.pi
    assert abs(np.cos(events["zenith"]).mean()) < 0.1  # directions cover the sphere
    assert 100 <= events["energy"].min() and events["energy"].max() > 3e4
    assert set(events["event_class"]) == {1, 2}


# ------------------------------------------------------------------------------------------------------------
# same settings, same bytes
# ------------------------------------------------------------------------------------------------------------

def processes_of_group(group):
    """Processes of a process group that are alive. A killed one may stay a zombie: these do not count."""
    alive = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, of_group = stat.read_text().rpartition(")")[2].split()[:3]
        except OSError:
            continue  # it has just ended
        if int(of_group) == group and state != "Z":
            alive.append(int(stat.parent.name))
    return alive


def start_and_signal(out_dir, send):
    """Start the demo with one worker in a process group of its own; send(process) after the first batch."""
    command = [sys.executable, "simulate.py", f"--out_dir={out_dir}", "--workers=1", *SETTINGS]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                               start_new_session=True, preexec_fn=hear_ctrl_c)
    while process.poll() is None and not (out_dir / ".parts" / "meta_1.parquet").exists():
        time.sleep(0.01)
    send(process)
    _, stderr = process.communicate(timeout=60)
    for _ in range(500):
        if not processes_of_group(process.pid):
            break
        time.sleep(0.02)
    assert not processes_of_group(process.pid), "workers outlive the main process"
    assert not (out_dir / "test" / "batch_8.parquet").exists(), "it was too fast to be interrupted"
    return process.returncode, stderr


def test_killed_run_goes_on_to_the_same_bytes(demo, tmp_path):
    # SIGKILL, to the main process alone
    code, _ = start_and_signal(tmp_path / "demo", lambda process: process.kill())
    assert code == -signal.SIGKILL
    assert json.loads((tmp_path / "demo/simulate.json").read_text())["complete"] is False
    first = tmp_path / "demo" / "train" / "batch_1.parquet"
    written = first.stat().st_mtime_ns
    run_ok("simulate.py", f"--out_dir={tmp_path}/demo", "--workers=1", *SETTINGS)
    assert all_bytes(tmp_path / "demo") == all_bytes(demo)  # which also had another number of workers
    assert first.stat().st_mtime_ns == written, "a finished batch was simulated again"


def test_ctrl_c_stops_with_one_line(tmp_path):
    code, stderr = start_and_signal(tmp_path / "demo", lambda process: os.killpg(process.pid, signal.SIGINT))
    assert code == 130 and "Traceback" not in stderr and "give the same command again" in stderr


def test_seed_changes_every_event(demo, tmp_path):
    run_ok("simulate.py", f"--out_dir={tmp_path}/raw", "--seed=4", "--workers=1", *SMALL)
    metas = (pq.read_table(path / "train_meta.parquet") for path in (demo, tmp_path / "raw"))
    before, now = (meta["azimuth"].to_numpy() for meta in metas)
    assert len(now) == 70 and not np.isin(now, before).any()


def test_batches_differ(events):
    assert len(np.unique(events["azimuth"])) == 3100


def test_complete_folder_is_left_alone_and_others_are_refused(tmp_path):
    out_dir = tmp_path / "raw"
    run_ok("simulate.py", f"--out_dir={out_dir}", "--workers=1", *SMALL)
    before = all_bytes(out_dir)
    assert "complete" in run_ok("simulate.py", f"--out_dir={out_dir}", "--workers=2", *SMALL).stdout
    assert "n_events = 70, now it is 71" in user_error("simulate.py", f"--out_dir={out_dir}", *SMALL,
                                                       "--n_events=71")
    assert "seed" in user_error("simulate.py", f"--out_dir={out_dir}", *SMALL, "--seed=9")
    assert all_bytes(out_dir) == before

    (out_dir / "train" / "batch_2.parquet").unlink()  # complete no more: it is made again, the same
    run_ok("simulate.py", f"--out_dir={out_dir}", "--workers=1", *SMALL)
    assert all_bytes(out_dir) == before

    record = json.loads((out_dir / "simulate.json").read_text())
    assert "noise = 1.0, now it is 2.0" in user_error("simulate.py", f"--out_dir={out_dir}", *SMALL,
                                                      "--noise=2")
    ice = ("scattering", "absorption", "dust", "efficiency", "noise", "afterpulses", "AFTERPULSE_DELAY")
    older = {key: value for key, value in record.items() if key not in ice}
    (out_dir / "simulate.json").write_text(json.dumps(older))  # written before there were such knobs
    assert "complete" in run_ok("simulate.py", f"--out_dir={out_dir}", *SMALL).stdout
    assert "noise = 1.0, now it is 2.0" in user_error("simulate.py", f"--out_dir={out_dir}", *SMALL,
                                                      "--noise=2")

    (out_dir / "simulate.json").write_text(json.dumps(record | {"DUST_DIRT": 1.0}))  # as if edited since
    assert "DUST_DIRT" in user_error("simulate.py", f"--out_dir={out_dir}", *SMALL)
    (out_dir / "simulate.json").unlink()  # might be the real Kaggle data
    assert "did not write" in user_error("simulate.py", f"--out_dir={out_dir}", *SMALL)


def test_unwritable_and_full_disks_give_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    user_error("simulate.py", f"--out_dir={tmp_path}/file/raw", *SMALL)

    def small_disk():  # room for the geometry, not for a batch: the worker fails
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
    args = [f"--out_dir={tmp_path}/raw", "--n_events=1200", "--events_per_batch=1000", "--n_test_events=0",
            "--workers=2"]
    assert "batch_1.parquet" in user_error("simulate.py", *args, preexec_fn=small_disk)
    assert not list(tmp_path.glob("raw/train/batch_1.*")), "half a file was left"


# ------------------------------------------------------------------------------------------------------------
# geometry
# ------------------------------------------------------------------------------------------------------------

def test_built_in_geometry_is_icecubes():
    strings = simulate.build_geometry().reshape(86, 60, 3)
    assert (strings[:, :, :2] == strings[:, :1, :2]).all() and (np.diff(strings[:, :, 2]) < 0).all()
    gaps = np.linalg.norm(strings[:, None, 0, :2] - strings[None, :, 0, :2], axis=-1) + 1e9 * np.eye(86)
    np.testing.assert_allclose(gaps[:78, :78].min(1), 125, atol=0.1)
    assert (np.sum(gaps[:78, :78] < 126, axis=1) == 6).sum() == 50  # the inner ones have six neighbours
    assert gaps[78:].min() > 30 and gaps[35, 78:].max() < 75  # DeepCore stands around string 36
    np.testing.assert_allclose(-np.diff(strings[:78, :, 2]), 17.02, atol=0.011)
    np.testing.assert_allclose(-np.diff(strings[78:, :, 2]), [[10] * 9 + [257] + [7] * 49] * 8, atol=0.011)


def test_given_geometry_is_used(demo, tmp_path):
    moved = np.column_stack([np.arange(5160), np.round(simulate.build_geometry() @ np.diag([1, 1, 0.5]), 2)])
    np.savetxt(tmp_path / "g.csv", moved[::-1], delimiter=",", header="sensor_id,x,y,z", comments="",
               fmt=["%d", "%.2f", "%.2f", "%.2f"])  # rows in another order, too
    args = [f"--out_dir={tmp_path}/raw", "--workers=1", "--seed=3", *SMALL]
    run_ok("simulate.py", *args, f"--geometry={tmp_path}/g.csv")
    written = np.loadtxt(tmp_path / "raw" / "sensor_geometry.csv", delimiter=",", skiprows=1)
    np.testing.assert_array_equal(written, np.column_stack([moved, np.arange(5160) // 60]))
    meta, other = (pq.read_table(path / "train_meta.parquet").slice(0, 40)
                   for path in (tmp_path / "raw", demo))
    assert meta["last_pulse_index"] != other["last_pulse_index"]
    assert "geometry" in user_error("simulate.py", *args)


def test_any_detector_is_simulated_prepared_and_trained_on(tmp_path):
    """Strings of 5 to 11 DOMs, 95 in all: whatever counts 5160 or 60 would fail."""
    rows, lengths = ["sensor_id,x,y,z,string"], [11, 5, 8, 9, 10, 11, 8, 7, 9, 9, 8]
    for string, length in enumerate(lengths):
        x, y = 90 * (string % 4) - 135, 90 * (string // 4) - 90
        rows += [f"{len(rows) - 1 + i},{x},{y},{120 - 25 * i},{string}" for i in range(length)]
    (tmp_path / "g.csv").write_text("\n".join(rows) + "\n")
    run_ok("simulate.py", f"--out_dir={tmp_path}/raw", "--workers=1", f"--geometry={tmp_path}/g.csv",
           "--n_events=120", "--events_per_batch=60", "--n_test_events=0")
    run_ok("prepare.py", f"--input_dir={tmp_path}/raw", f"--data_dir={tmp_path}/data",
           "--splits={'pretrain': (1, 1), 'val': (2, 2)}", "--workers=1")
    geometry, split = data.read_geometry(tmp_path / "data"), data.open_split(tmp_path / "data", "pretrain")
    assert len(geometry) == 95 and np.bincount(geometry["string"]).tolist() == lengths
    assert split.pulses["dom"].max() == 94 and len(np.unique(split.pulses["dom"][~split.pulses["aux"]])) > 80
    run_ok("train.py", f"--data_dir={tmp_path}/data", f"--out_dir={tmp_path}/run", *TINY_RUN,
           "--cls_target=charge+center+motion", "--dom_head=position")
    log = (tmp_path / "run/log.csv").read_text().splitlines()
    first = dict(zip(log[0].split(","), log[1].split(",")))
    assert float(first["val_dom_loss"]) == pytest.approx(np.log(95), abs=0.5)
    assert 0 < float(first["val_motion_angle"]) < 3.15


@pytest.mark.parametrize("case", ["absent", "columns", "rows", "nan", "text", "kilometres", "depth"])
def test_bad_geometry_is_refused(tmp_path, monkeypatch, case):
    rows = [[str(value) for value in (dom, *xyz)]
            for dom, xyz in enumerate(simulate.build_geometry().tolist())]
    header = ["sensor_id", "x", "y", "z"]
    if case == "columns":
        header[3] = "depth"
    elif case == "rows":
        rows.pop(100)
    elif case in ("nan", "text"):
        rows[7][2] = {"nan": "nan", "text": "north"}[case]
    elif case == "kilometres":
        rows = [[dom, *(str(float(value) / 1000) for value in xyz)] for dom, *xyz in rows]
    elif case == "depth":  # Prometheus measures z from the surface
        rows = [[dom, x, y, str(float(z) - 1948.07)] for dom, x, y, z in rows]
    path = tmp_path / "g.csv"
    if case != "absent":
        path.write_text("\n".join(",".join(row) for row in [header, *rows]) + "\n")
    with pytest.raises(SystemExit) as refusal:
        simulate.choose_detector(str(path))
    assert str(path) in str(refusal.value) and "\n" not in str(refusal.value)
    if case == "columns":  # the whole program once
        assert "sensor_id,x,y,z" in user_error("simulate.py", f"--out_dir={tmp_path}/raw",
                                               f"--geometry={path}", *SMALL)


# ------------------------------------------------------------------------------------------------------------
# physics
# ------------------------------------------------------------------------------------------------------------

def line_fit(events):
    """Fit r = r0 + v t to each event's aux=False pulses, weighted by charge -> unit vectors -v (n, 3)."""
    event, clock, weight = events["event"], events["time"] - 1e4, events["charge"] * ~events["aux"]

    def total(values):
        return np.bincount(event, values, minlength=events["n"])
    clock = clock - (total(weight * clock) / total(weight))[event]
    velocity = np.stack([total(weight * clock * events["position"][:, i]) for i in range(3)], 1)  # times > 0
    return -velocity / np.linalg.norm(velocity, axis=1, keepdims=True)


def to_source(azimuth, zenith):
    return np.stack([np.cos(azimuth) * np.sin(zenith), np.sin(azimuth) * np.sin(zenith), np.cos(zenith)], 1)


def test_bright_tracks_point_to_their_source(events):
    cosine = (line_fit(events) * to_source(events["azimuth"], events["zenith"])).sum(1)
    good = np.bincount(events["event"], ~events["aux"], minlength=events["n"])
    bright_tracks = (events["event_class"] == 1) & (good > 60)
    assert bright_tracks.sum() > 50
    assert cosine[bright_tracks].mean() > 0.5  # -0.5 if angles meant where it flies to


def test_line_fit_is_as_hard_as_for_the_real_data(events):
    cosine = (line_fit(events) * to_source(events["azimuth"], events["zenith"])).sum(1)
    error = np.arccos(np.clip(cosine, -1, 1))
    is_track = events["event_class"] == 1
    assert 0.2 < np.median(error[is_track]) < 0.6 and 1.2 < np.median(error[~is_track]) < 1.8
    assert 1.0 < error.mean() < 1.35  # 1.18 rad on Kaggle's


def test_pulse_counts_look_real(events):
    n_pulses = np.bincount(events["event"], minlength=events["n"])
    n_good = np.bincount(events["event"], ~events["aux"], minlength=events["n"]).astype(int)
    assert 50 < np.median(n_pulses) < 70  # Kaggle: 62
    assert 0.09 < (n_pulses > 127).mean() < 0.18  # 0.13
    assert 28 < np.minimum(n_good, 127).mean() < 43  # 35
    assert 10 < n_pulses.min() < 40 and 1500 < n_pulses.max() <= 100_000  # 15, 110,517
    assert 25 < np.median(n_pulses - n_good) < 50
    assert 0.3 < (events["event_class"] == 1).mean() < 0.6


def test_energy_shows_in_the_light(events):
    light = np.log10(np.bincount(events["event"], events["charge"]))
    assert np.corrcoef(light, np.log10(events["energy"]))[0, 1] > 0.4


def track_photons(n, rng):
    """Photons of a cascade along z, step by step through uniform ice -> cosine and weight of those that pass
    100 m from the vertex, and their detour [m]. They leave by the angular profile that 1210.5140 fitted, and
    scatter by Henyey and Greenstein's law with a mean cosine of 0.9.
    """
    grid, mean_cosine = np.linspace(-1, 1, 100_001), 0.9
    share = np.cumsum(np.maximum(4.27 * np.exp(-6.02 * np.abs(grid - 1 / 1.33) ** 0.299) - 0.001, 0))
    cosine = np.interp(rng.random(n), share / share[-1], grid)
    way, place, path, found = np.array([0.0, 0, 1])[:, None] + np.zeros((3, n)), np.zeros((3, n)), 0.0, []
    for _ in range(250):  # turn by cosine, go on; 680 m are more than light gets
        side = np.cross(way, rng.standard_normal((3, n)), axis=0)
        way = cosine * way + np.sqrt(1 - cosine**2) * side / np.linalg.norm(side, axis=0)
        step = rng.exponential(simulate.SCATTERING_LENGTH * (1 - mean_cosine), n)
        place, path = place + step * way, path + step
        distance = np.linalg.norm(place, axis=0)
        near = np.abs(distance - 100) < 8
        found.append([place[2, near] / distance[near], np.exp(-path[near] / simulate.ABSORPTION_LENGTH),
                      (path - distance)[near]])
        x = (1 - mean_cosine**2) / (1 - mean_cosine + 2 * mean_cosine * rng.random(n))
        cosine = (1 + mean_cosine**2 - x**2) / (2 * mean_cosine)
    return np.concatenate(found, axis=1)


def test_light_of_a_cascade_leans_forward_as_that_of_tracked_photons():
    cosine, weight, detour = track_photons(20_000, np.random.default_rng(0))
    tracked = np.histogram(cosine, 10, (-1, 1), weights=weight)[0]
    angle = np.repeat(np.arccos(np.linspace(-0.9, 0.9, 10)), 6)  # of 60 DOMs around a vertex above the dust
    doms = 100 * np.stack([np.cos(angle), np.sin(angle), 0 * angle]) + np.array([[0], [0], [300]])
    _, dom, light, _, path, _ = simulate.cascade_light(np.array([[0.0], [0], [300]]), np.eye(3)[:, :1],
                                                       np.array([1e5]), doms, simulate.SimulateConfig())
    assert (dom == np.arange(60)).all()
    np.testing.assert_allclose(light[::6] / light.mean(), tracked / tracked.mean(), atol=0.15)
    front, back = (np.average(detour[there], weights=weight[there])
                   for there in (cosine > 0.8, cosine < -0.8))
    speed = simulate.LIGHT_SPEED / simulate.REFRACTIVE_INDEX
    scale = 1 / (1 / simulate.PANDEL_TIME + speed / simulate.ABSORPTION_LENGTH)  # rougher: AMANDA's delays
    later = (path[0] - path[-1]) / simulate.PANDEL_LENGTH * scale  # [ns]
    assert later == pytest.approx((back - front) / speed, rel=0.4)


def test_dust_layer_is_dark(events):
    """DOMs in the layer see less than those above and below it (strings 1..78, aux=False)."""
    z = events["position"][(events["dom"] < 78 * 60) & ~events["aux"], 2]
    above, dust, below = (np.sum(np.abs(z - center) < 51) for center in (50, -102, -250))
    assert dust < 0.6 * above and dust < 0.6 * below


def light_at(distance, source=simulate.cascade_light, z=300.0, **knobs):
    """Expected p.e. and mean delay [ns] in DOMs at these distances [m] beside a cascade, or a muon that
    flies along x and passes below them, all at height z.
    """
    config, along = simulate.SimulateConfig(**knobs), 0.0 if source is simulate.cascade_light else 600.0
    doms = np.stack([along + 0 * distance, distance, z + 0 * distance])
    _, dom, expected, direct, *rest = source(np.array([[0.0], [0], [z]]), np.eye(3)[:, :1], np.array([1e5]),
                                             doms, config)
    assert (dom == np.arange(len(distance))).all()
    pair, _, time, weight = simulate.draw_photons(dom, dom, 1e3 + 0 * expected, direct, *rest, config,
                                                  np.random.default_rng(0))
    delay = np.bincount(pair, weight * (time - direct[pair])) / np.bincount(pair, weight)
    return expected, delay


@pytest.mark.parametrize("source", [simulate.cascade_light, simulate.track_light], ids=["cascade", "muon"])
def test_knobs_of_the_ice(source):
    distance = np.array([20.0, 100, 200])
    light, delay = light_at(distance, source)
    absorbed, absorbed_delay = light_at(distance, source, absorption=1.3)
    assert (np.diff(absorbed / light) < 0).all() and (absorbed < light).all()  # the further the more is lost
    assert absorbed[-1] < 0.7 * light[-1] and (absorbed_delay < delay).all()  # late light went furthest
    scattered, late = light_at(distance, source, scattering=1.3)
    assert (late > 1.1 * delay).all() and scattered[-1] < 0.9 * light[-1]
    clear, early = light_at(distance, source, scattering=0.7)
    assert (early < delay).all() and early[-1] < 0.8 * delay[-1] and clear[-1] > 1.1 * light[-1]
    for z, low, high in ((300.0, 0.9, 1), (simulate.DUST_Z, 0, 0.5)):  # above the dust layer and in it
        ratio = light_at(distance, source, z, dust=2.0)[0] / light_at(distance, source, z)[0]
        assert low < ratio[-1] < high and (np.diff(ratio) < 0).all()


def simulate_one_chunk(**knobs):
    """Pulses of the same neutrinos, whatever the knobs -> aux, charge, time after the DOM's first pulse."""
    (event, dom, pulse_time, charge, aux), _ = simulate.simulate_chunk(
        simulate.choose_detector(""), simulate.SimulateConfig(**knobs), np.random.default_rng(1))
    channel = event * 5160 + dom
    first = np.full(channel.max() + 1, np.iinfo(np.int64).max)
    np.minimum.at(first, channel, pulse_time)
    return aux, charge, pulse_time - first[channel]


def test_knobs_of_the_tubes():
    aux, charge, _ = simulate_one_chunk()
    quiet_aux, quiet_charge, quiet_later = simulate_one_chunk(noise=0.0)
    assert quiet_aux.mean() < 0.6 * aux.mean() and simulate_one_chunk(noise=2.0)[0].mean() > 1.15 * aux.mean()
    assert 1.15 < simulate_one_chunk(noise=0.0, efficiency=1.3)[1].sum() / quiet_charge.sum() < 1.35

    _, _, later = simulate_one_chunk(noise=0.0, afterpulses=0.06)
    assert (quiet_later > 5000).mean() < 0.002 and 0.01 < (later > 5000).mean() < 0.06
    assert 0.01 < (later > 5000).sum() / quiet_charge.sum() < 0.06 and later.max() < 20_000


def test_a_detector_that_sees_nothing_is_refused(tmp_path):
    rows = [f"{i},{37 * i % 101},{i},{-17 * (i % 10)}" for i in range(60)]  # no two above each other
    (tmp_path / "geometry.csv").write_text("\n".join(["sensor_id,x,y,z", *rows]) + "\n")
    line = user_error("simulate.py", f"--geometry={tmp_path}/geometry.csv", f"--out_dir={tmp_path}/raw",
                      "--n_events=10", "--n_test_events=0")
    assert "triggered the detector" in line and "column string" in line


def test_energies_begin_where_they_are_told():
    detector, rng = simulate.choose_detector(""), np.random.default_rng(0)
    _, events = simulate.simulate_events(100, detector, simulate.SimulateConfig(energy_min=3e3), rng)
    assert 3e3 <= events["energy"].min() < 4e3


def test_without_afterpulses_no_number_is_drawn_for_them():
    """So that the bytes are those of a simulation without this knob."""
    rng, weight = np.random.default_rng(0), np.array([1.0, 7.5])
    before = rng.bit_generator.state
    late = simulate.draw_afterpulses(np.arange(2), np.arange(2), np.zeros(2), weight, 0.0, rng)
    assert all(len(column) == 0 for column in late) and rng.bit_generator.state == before


@pytest.mark.parametrize("knob", ["scattering=0", "absorption=-1", "efficiency=0", "dust=-0.1", "noise=-1",
                                  "afterpulses=-0.1", "afterpulses=6", "energy_min=0", "energy_min=1e7"])
def test_bad_ice_is_refused(tmp_path, knob):
    assert knob.split("=")[0] in user_error("simulate.py", f"--out_dir={tmp_path}/raw", f"--{knob}", *SMALL)
    assert not (tmp_path / "raw").exists()


def test_every_event_has_triggered(events):
    for event in range(events["n"]):
        pulses = slice(*np.searchsorted(events["event"], [event, event + 1]))
        good = events["time"][pulses][~events["aux"][pulses]]
        assert (good[7:] - good[:-7]).min() <= 5000


def test_aux_is_the_coincidence_of_the_written_pulses(events):
    coincident = local_coincidence(events["event"], RUNG[events["dom"]], events["time"])
    assert not (coincident & events["aux"]).any()
    # the readout window may cut off a partner, rarely
    assert (~coincident & ~events["aux"]).sum() < 1e-3 * len(coincident)


RUNG = simulate.number_along_strings(simulate.choose_detector(""))


def brute_force(event, dom, time):
    def pair(a, b):
        return (event[a] == event[b] and dom[a] // 60 == dom[b] // 60
                and 1 <= abs(int(dom[a]) - int(dom[b])) <= 2
                and abs(time[a] - time[b]) <= 1000)
    return np.array([any(pair(a, b) for b in range(len(event))) for a in range(len(event))], bool)


@pytest.mark.parametrize("seed", range(6))
def test_local_coincidence_against_all_pairs(seed):
    rng = np.random.default_rng(seed)
    n = 250
    doms = np.concatenate([np.arange(52, 70), [0, 1, 5158, 5159]])  # the end of a string and of the detector
    event = rng.integers(7, 10, n)
    dom = rng.choice(doms, n).astype([np.int16, np.uint16, np.int64][seed % 3])
    pulse_time = rng.choice([-3000, 0, 999, 1000, 1001, 2000, 2001, 5000, 400_000], n)  # borders and ties
    if seed >= 3:  # thin enough that about half are alone
        pulse_time = rng.uniform(5000, 60_000, n)
    expected = brute_force(event, dom, pulse_time)
    assert 0.1 < expected.mean() < 1 and not (seed >= 3 and expected.mean() > 0.9)
    np.testing.assert_array_equal(local_coincidence(event, RUNG[dom], pulse_time), expected)


def test_local_coincidence_of_nothing_and_of_very_much():
    nothing = np.zeros(0, int)
    assert local_coincidence(nothing, nothing, nothing).shape == (0,)
    n = 200_000  # all within 1 us on two neighbours, and one DOM apart: all pairs would be 4e10
    rng = np.random.default_rng(0)
    dom = np.append(rng.integers(30, 32, n), 34)
    found = local_coincidence(np.zeros(n + 1, int), RUNG[dom], rng.integers(0, 900, n + 1))
    assert found[:n].all() and not found[n]
