"""tools.prometheus as users run it: pulses, times, labels, batches, interruptions, hostile input."""
import os
import resource
import shutil
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import data
import simulate
import tables
from conftest import ROOT, TINY_RUN, kill_when_there_is, run_ok, user_error
from test_finetune import KNOBS
from test_prepare import GEOMETRY, assert_equal_records, reference, write_geometry
from tools import layout, prometheus

TOOL = "tools.prometheus"


# ------------------------------------------------------------------------------
# photon files, and what must come out of them
# ------------------------------------------------------------------------------

def track_photons(rng, azimuth, zenith, n):
    """Photons of a track that comes from (azimuth, zenith): their rows of the geometry, their times."""
    flight = -simulate.unit_vector(azimuth, zenith).T
    along = (GEOMETRY - rng.uniform(-150, 150, 3)) @ flight
    distance = np.sqrt(np.maximum(((GEOMETRY - rng.uniform(-150, 150, 3)) ** 2).sum(axis=1) - along**2, 1))
    # every fourth string: the tool finds each position in 0.6 ms, once per file
    light = np.exp(-distance / 20) * (np.arange(5160) // 60 % 4 == 0)
    dom = rng.choice(5160, n, p=light / light.sum())
    return dom, 4000 + along[dom] / 0.3 + distance[dom] / 0.22 + rng.exponential(30, n)


def make_photons(rng, n, lengths):
    for i in range(n):
        azimuth, zenith = rng.uniform(0, 2 * np.pi), np.arccos(rng.uniform(-0.9, 0.9))
        dom, times = track_photons(rng, azimuth, zenith, int(lengths[i % len(lengths)]))
        yield azimuth, zenith, 10 ** rng.uniform(2, 6), dom, times


HADRONS = -2000001006
KINDS_OF_EVENTS = [([13, HADRONS], 1), ([-11, HADRONS], 2), ([-15, HADRONS], 0)]  # final states, event_class


def write_photons(path, events, angles="flight", final_states=True, list_type=pa.large_list, spoil=None):
    """A Prometheus file of (azimuth, zenith of the source, energy, dom, time)."""
    azimuth_sign, zenith_sign = layout.READINGS[angles]
    truth, photons = [], []
    for i, (azimuth, zenith, energy, dom, times) in enumerate(events):
        flight = azimuth + np.pi, np.pi - zenith
        row = {"interaction": 1, "initial_state_energy": energy,
               "initial_state_azimuth": (flight[0] if azimuth_sign == 1 else azimuth) - 2 * np.pi,
               "initial_state_zenith": flight[1] if zenith_sign == 1 else zenith}
        if final_states:
            row |= {"final_state_energy": [0.7 * energy, 0.3 * energy],
                    "final_state_azimuth": [flight[0] + 0.01, flight[0] - 0.02],
                    "final_state_zenith": [flight[1], flight[1]],
                    "final_state_type": [float(number) for number in KINDS_OF_EVENTS[i % 3][0]]}
        truth.append(row)
        position = GEOMETRY[dom] + [0, 0, -1948.07]
        photons.append({"sensor_pos_x": position[:, 0], "sensor_pos_y": position[:, 1],
                        "sensor_pos_z": position[:, 2], "t": times})
    if spoil:
        spoil(truth, photons)
    struct = pa.struct([(name, list_type(pa.float64())) for name in photons[0]])
    columns = {"mc_truth": pa.array(truth), "photons": pa.array(photons, struct)}
    path.parent.mkdir(exist_ok=True)
    pq.write_table(pa.table(columns), path, row_group_size=7)


def photon_reference(photons, window, **rule):
    """Photons -> pulses -> the rule, one event after another -> EVENT and PULSE records."""
    events = []
    for event_id, event_class, (azimuth, zenith, energy, dom, times) in photons:
        pulses = []
        for d in np.unique(dom):
            for t in np.sort(times[dom == d]):
                if window and pulses and pulses[-1][0] == d and t - pulses[-1][1] <= window:
                    pulses[-1][2] += 1
                else:
                    pulses.append([d, t, 1.0])
        pulses = np.array(sorted(pulses, key=lambda pulse: (pulse[1], pulse[0])))
        d, t, q = pulses.T
        apart = np.abs(d[:, None] - d)
        near = (d[:, None] // 60 == d // 60) & (apart >= 1) & (apart <= 2) & (np.abs(t[:, None] - t) <= 1000)
        is_good = near.any(axis=1)
        first = t[is_good].min() if is_good.any() else t.min()
        shake = np.rint(300 * (2 * data.uniform_hash(0, event_id, 0) - 1))
        events.append({"event_id": event_id, "time": np.rint(t + (10_000 + shake - first)), "charge": q,
                       "sensor_id": d.astype(int), "auxiliary": ~is_good, "azimuth": azimuth,
                       "zenith": zenith, "energy": energy, "event_class": event_class})
    return reference(events, **rule)


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def photons(tmp_path_factory):
    """Three files of tracks and one of single photons, in the convention of the real sample that we have."""
    folder, rng = tmp_path_factory.mktemp("photons"), np.random.default_rng(5)
    write_geometry(folder)
    files = [list(make_photons(rng, 25, (300, 0, 100, 127, 3000, 1))) for _ in range(3)]
    files.append(list(make_photons(rng, 6, (1, 0))))
    for i, events in enumerate(files):
        write_photons(folder / f"files/{i}.parquet", events, "zenith_flight", final_states=i in (2, 3),
                      list_type=(pa.large_list, pa.list_)[i % 2])
    flags = [f"--input_dir={folder}/files", f"--geometry={folder}/sensor_geometry.csv",
             "--angles=zenith_flight", "--events_per_batch=20"]
    return folder, files, flags


def lit_events(files):
    """event_id, class and the event, of all that have photons."""
    return [(number * prometheus.ROWS_PER_FILE + row, KINDS_OF_EVENTS[row % 3][1] if number > 2 else 0, event)
            for number, events in enumerate(files, start=1)
            for row, event in enumerate(events) if len(event[4])]


@pytest.fixture(scope="module")
def straight(photons, tmp_path_factory):
    """A run that nothing disturbed."""
    out_dir = tmp_path_factory.mktemp("straight") / "raw"
    return out_dir, run_ok(TOOL, *photons[2], f"--out_dir={out_dir}", "--workers=1")


# ------------------------------------------------------------------------------
# what is written
# ------------------------------------------------------------------------------

def test_photons_become_pulses_and_go_through_prepare(photons, straight, tmp_path):
    out_dir, done = straight
    n_lit = len(lit_events(photons[1]))
    assert f" {n_lit} events, " in done.stdout and "81/81" in done.stderr
    assert f" {81 - n_lit} events without a photon were left out" in done.stdout
    numbers = pq.read_table(out_dir / "train_meta.parquet")["batch_id"].to_numpy()
    assert np.bincount(numbers).tolist() == [0, 20, 1, 20, 1, 20, 1, 3]  # files of 21, 21, 21 and 3
    found, given = (tables.read_detector(folder / "sensor_geometry.csv") for folder in (out_dir, photons[0]))
    assert np.array_equal(found.position, given.position) and np.array_equal(found.string, given.string)
    assert not (out_dir / ".parts").exists()

    command = f"python prepare.py --input_dir={out_dir} --data_dir={out_dir}_prepared "
    command += "--splits=\"{'pretrain': (1, 6), 'val': (7, 7)}\""
    assert done.stdout.splitlines()[-1] == f"to go on, run: {command}"
    run_ok("prepare.py", f"--input_dir={out_dir}", f"--data_dir={tmp_path}/data", "--splits={'all': (1, 7)}")
    split = data.open_split(tmp_path / "data", "all")
    events, pulses = photon_reference(lit_events(photons[1]), 3.3)
    for label in ("azimuth", "zenith"):
        np.testing.assert_allclose(split.events[label], events[label], atol=2e-6)
        events[label] = split.events[label]
    assert_equal_records(split.events, events)
    assert_equal_records(split.pulses, pulses)
    assert split.events["total_charge"].sum() == sum(len(event[4]) for *_, event in lit_events(photons[1]))
    assert set(split.events["event_class"]) == {0, 1, 2}


def test_the_first_local_coincidence_lies_near_10000(straight):
    table = pa.concat_tables(pq.read_table(path) for path in (straight[0] / "train").iterdir()).to_pydict()
    event_id, aux, time = (np.array(table[name]) for name in ("event_id", "auxiliary", "time"))
    first = np.array([time[(event_id == event) & ~aux].min() for event in np.unique(event_id[~aux])])
    assert len(first) > 10 and (np.abs(first - 10_000) <= 300).all() and first.std() > 50
    assert any(time[(event_id == event) & aux].min(initial=10**9) < 9700 for event in np.unique(event_id))


def test_a_pulse_long_before_the_coincidence_does_not_become_negative():
    event, time = np.array([0, 0, 0, 1]), np.array([5.0, 20_000.0, 20_100.5, 7.0])
    aux = np.array([True, False, False, True])
    shifted = layout.shift_times(event, time, aux, np.array([3, 4]), 0)
    assert shifted[:3].tolist() == [0, 19_995, 20_096] and abs(shifted[3] - 10_000) <= 300
    assert shifted.dtype == np.int64


def test_every_photon_is_a_pulse_without_a_window(photons, tmp_path):
    run_ok(TOOL, *photons[2], f"--out_dir={tmp_path}/raw", "--merge_window=0")
    run_ok("prepare.py", f"--input_dir={tmp_path}/raw", f"--data_dir={tmp_path}/all", "--max_pulses=40",
           "--splits={'all': (1, 1)}")
    split = data.open_split(tmp_path / "all", "all")
    lit = lit_events(photons[1])[:20]
    events, pulses = photon_reference(lit, 0, max_pulses=40)
    assert_equal_records(split.pulses, pulses)
    assert np.array_equal(split.events["n_pulses"], [len(event[4]) for *_, event in lit])


def test_merging_photon_by_photon():
    rng = np.random.default_rng(6)
    n = 3000
    event, dom = np.sort(rng.integers(0, 5, n)), rng.integers(0, 4, n)
    time = rng.integers(0, 2000, n).astype(float)
    for window in (0, 1, 3.3, 50, 1e9):
        found = np.array(prometheus.photons_to_pulses(event, dom, time, window))
        pulses = []
        for e, d, t in sorted(zip(event, dom, time)):
            if window and pulses and pulses[-1][:2] == [e, d] and t - pulses[-1][2] <= window:
                pulses[-1][3] += 1
            else:
                pulses.append([e, d, t, 1])
        order = np.lexsort(found[[1, 2, 0]])  # ties in time are in no order
        assert np.array_equal(found[:, order].T, sorted(pulses, key=lambda p: (p[0], p[2], p[1])))


def test_small_files_share_a_batch_and_numbers_have_no_gaps(tmp_path):
    rng = np.random.default_rng(8)
    write_geometry(tmp_path)
    for i, lengths in enumerate([(50, 60), (0,), (0, 9), (7,), (0,)]):  # the second and the fifth are dark
        write_photons(tmp_path / f"files/{i}.parquet", list(make_photons(rng, 4, lengths)))
    flags = [f"--input_dir={tmp_path}/files", f"--geometry={tmp_path}/sensor_geometry.csv"]
    numbers = {}
    for n in (4, 8, 100):
        done = run_ok(TOOL, *flags, f"--events_per_batch={n}", f"--out_dir={tmp_path}/{n}")
        numbers[n] = np.bincount(pq.read_table(tmp_path / f"{n}/train_meta.parquet")["batch_id"]).tolist()
        assert len(list((tmp_path / f"{n}/train").iterdir())) == len(numbers[n]) - 1
        assert "10 events without a photon" in done.stdout and "(1.parquet" not in done.stderr + done.stdout
    assert numbers == {4: [0, 4, 2, 4], 8: [0, 4, 6], 100: [0, 10]}
    assert "one batch cannot be split" in done.stdout


@pytest.mark.parametrize("chunk", [100, 2000, 2**18])
def test_events_are_whole_however_files_and_batches_are_cut(photons, monkeypatch, chunk):
    """A few events at a time, of which a batch takes four: all have four, the last one the rest."""
    monkeypatch.setattr(prometheus, "count_events", lambda n: None)  # it counts for a bar, in workers
    config, files = prometheus.PrometheusConfig(), [(1, photons[0] / "files/0.parquet", 25)]
    detector = layout.read_doms(photons[0] / "sensor_geometry.csv")

    def read():
        return list(prometheus.convert_files(config, *detector, files, []))
    (events, pulses), = read()
    monkeypatch.setattr(prometheus, "CHUNK", chunk)
    chunks = read()
    assert (len(chunks) > 1) == (chunk < 2**18)
    numbers, event_pieces, pulse_pieces = zip(*prometheus.cut(chunks, 4))
    lengths = [len(piece) for piece in event_pieces]
    assert np.bincount(np.repeat(numbers, lengths)).tolist() == [4, 4, 4, 4, 4, 1]
    for piece, its_pulses in zip(event_pieces, pulse_pieces):
        owner = np.repeat(piece["event_id"], piece["n_pulses"])
        assert np.array_equal(its_pulses["event_id"], owner)
    assert pa.concat_tables(event_pieces).equals(events) and pa.concat_tables(pulse_pieces).equals(pulses)


# ------------------------------------------------------------------------------
# which way the angles point
# ------------------------------------------------------------------------------

@pytest.mark.parametrize("final_states", [False, True])
@pytest.mark.parametrize("written", list(layout.READINGS))
def test_the_light_or_the_final_states_tell_the_reading(tmp_path, monkeypatch, written, final_states):
    """Tracks, light alone; and single photons, where only the final states can tell."""
    monkeypatch.setattr(prometheus, "count_events", lambda n: None)  # it counts for a bar, in workers
    events = list(make_photons(np.random.default_rng(9), 25, (1,) if final_states else (300, 0, 100, 1)))
    write_photons(tmp_path / "a.parquet", events, written, final_states)
    write_geometry(tmp_path)
    detector = layout.read_doms(tmp_path / "sensor_geometry.csv")
    lit = [event for event in events if len(event[4])]
    for angles in layout.READINGS:
        config, readings = prometheus.PrometheusConfig(angles=angles), []
        files = [(1, tmp_path / "a.parquet", 25)]
        tables = prometheus.convert_files(config, *detector, files, readings)
        labels = pa.concat_tables([table for table, _ in tables])
        assert readings == [("a.parquet", written, "final states" if final_states else "light")]
        right = [np.allclose(labels[name].to_numpy(), [event[i] for event in lit], atol=1e-6)
                 for i, name in enumerate(("azimuth", "zenith"))]
        signs = zip(layout.READINGS[angles], layout.READINGS[written])
        assert right == [sign == truth for sign, truth in signs]  # the knob decides, whatever the light says


def test_a_vertical_track_keeps_an_angle_that_prepare_takes():
    """pi in float32 is larger than pi."""
    one = np.zeros(1, np.int64)
    truth = {"azimuth": np.zeros(1), "zenith": np.full(1, np.pi, np.float32)}
    events, *_ = layout.event_tables(prometheus.PrometheusConfig(angles="flight"),
                                     SimpleNamespace(position=np.zeros((3, 1))), one, truth, one, one,
                                     np.zeros(1), np.ones(1), np.zeros(1, bool))
    assert events["zenith"].to_pylist() == [0.0]


def test_a_wrong_knob_is_a_warning(tmp_path):
    rng = np.random.default_rng(5)
    write_geometry(tmp_path)
    for i, angles in enumerate(layout.READINGS):  # flight, source, zenith_flight, azimuth_flight
        events = list(make_photons(rng, 25, (300, 1000)))
        write_photons(tmp_path / f"files/{i}.parquet", events, angles, False)
    write_photons(tmp_path / "files/4.parquet", list(make_photons(rng, 6, (1, 0))), "source")
    write_photons(tmp_path / "files/5.parquet", list(make_photons(rng, 6, (1, 0))), "source", False)
    flags = [f"--input_dir={tmp_path}/files", f"--geometry={tmp_path}/sensor_geometry.csv",
             f"--out_dir={tmp_path}/raw"]
    for done in (run_ok(TOOL, *flags), run_ok(TOOL, *flags)):  # the second time it is complete
        warnings = [line for line in done.stderr.splitlines() if line.startswith("warning: ")]
        assert "angles = 'flight': confirmed by the light of 1 file (0.parquet)" in done.stdout
        for words, advice in ((["the light of 1 file (1.parquet)"], "--angles=source"),
                              (["the light of 1 file (2.parquet)"], "--angles=zenith_flight"),
                              (["the light of 1 file (3.parquet)"], "--angles=azimuth_flight"),
                              (["the final states of 1 file (4.parquet)"], "--angles=source"),
                              (["neither light nor final states", "1 file (5.parquet)"], "was believed")):
            line, = [line for line in warnings if all(text in line for text in words)]
            assert line.endswith(advice), line
        assert len(warnings) == 5
    assert "complete, nothing to do" in done.stdout


# ------------------------------------------------------------------------------
# workers, interruptions, settings
# ------------------------------------------------------------------------------

def test_the_bytes_do_not_depend_on_the_workers(photons, straight, tmp_path):
    run_ok(TOOL, *photons[2], f"--out_dir={tmp_path}/raw", "--workers=3")
    assert contents(tmp_path / "raw") == contents(straight[0])


def test_a_complete_folder_is_left_alone(photons, straight, tmp_path):
    shutil.copytree(straight[0], tmp_path / "raw")
    shutil.copytree(photons[0], tmp_path / "photons")
    flags = [f"--input_dir={tmp_path}/photons/files", *photons[2][1:], f"--out_dir={tmp_path}/raw"]
    done = run_ok(TOOL, *flags)  # files may move
    assert "complete, nothing to do" in done.stdout and "event/s" not in done.stderr
    assert done.stdout.splitlines()[-1].startswith("to go on, run: python prepare.py ")
    for flag, words in (("--merge_window=2", "merge_window = 3.3, now it is 2"), ("--seed=1", "seed = 0"),
                        ("--events_per_batch=9", "events_per_batch = 20"), ("--angles=flight", "angles = ")):
        line = user_error(TOOL, *flags, flag)
        assert words in line and "choose another out_dir" in line
    shutil.copy(tmp_path / "photons/files/3.parquet", tmp_path / "photons/files/4.parquet")
    assert "input_dir = '4 files" in user_error(TOOL, *flags)
    (tmp_path / "photons/files/4.parquet").unlink()
    assert contents(tmp_path / "raw") == contents(straight[0])
    (tmp_path / "raw/train/batch_2.parquet").unlink()
    run_ok(TOOL, *flags)
    assert contents(tmp_path / "raw") == contents(straight[0])
    (tmp_path / "raw/prometheus.json").unlink()
    assert "did not write" in user_error(TOOL, *flags)


@pytest.mark.parametrize("where", ["batch_3.parquet", "train_meta.parquet"])
def test_stopped_in_the_main_process(photons, straight, tmp_path, monkeypatch, where):
    """Ctrl-C as the batches get their numbers, or right before the meta table is there."""
    flags, replace = [*photons[2], f"--out_dir={tmp_path}/raw"], os.replace

    def stop(source, target):
        if str(target).endswith(where):
            raise KeyboardInterrupt
        replace(source, target)
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", stop)
        with pytest.raises(AssertionError, match="give the same command again"):
            run_ok(TOOL, *flags)
    assert not (tmp_path / "raw" / where).exists() and (tmp_path / "raw/train/batch_1.parquet").exists()
    assert "81/81" in run_ok(TOOL, *flags).stderr  # nothing is converted twice, the bar begins there
    assert contents(tmp_path / "raw") == contents(straight[0])


def test_killed_and_gone_on_is_as_never_killed(tmp_path):
    write_geometry(tmp_path)
    events = list(make_photons(np.random.default_rng(4), 20, (1000, 3000)))
    write_photons(tmp_path / "files/0.parquet", events)
    for i in range(1, 8):
        shutil.copy(tmp_path / "files/0.parquet", tmp_path / f"files/{i}.parquet")
    flags = [f"--input_dir={tmp_path}/files", f"--geometry={tmp_path}/sensor_geometry.csv",
             "--events_per_batch=20", "--workers=1"]
    command = [sys.executable, "-m", TOOL, *flags, f"--out_dir={tmp_path}/a"]
    assert kill_when_there_is("group_*.json", tmp_path / "a/.parts", *command) < 8
    assert "seed = 0, now it is 1" in user_error(TOOL, *flags, f"--out_dir={tmp_path}/a", "--seed=1")
    run_ok(TOOL, *flags, f"--out_dir={tmp_path}/a")
    run_ok(TOOL, *flags, f"--out_dir={tmp_path}/b")
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_a_disk_that_fills_while_running(photons, tmp_path):
    """The disk (a limit on files) is full in the middle of a batch; here the tool starts by python -m."""
    command = [sys.executable, "-m", TOOL, *photons[2], "--events_per_batch=1000", "--merge_window=0"]
    done = subprocess.run([*command, f"--out_dir={tmp_path}/a"], cwd=ROOT, capture_output=True, text=True,
                          preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (150_000, 150_000)))
    line, = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    assert "pulses.parquet: cannot be written" in line, line
    assert not (tmp_path / "a/train_meta.parquet").exists()
    for name in ("a", "b"):
        subprocess.run([*command, f"--out_dir={tmp_path}/{name}"], cwd=ROOT, check=True, capture_output=True)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


# ------------------------------------------------------------------------------
# hostile input
# ------------------------------------------------------------------------------

def spoil_photon(name, value):
    def spoil(truth, photons):
        photons[3][name][0] = value
    return spoil


def spoil_truth(name, value):
    def spoil(truth, photons):
        truth[3][name] = value
    return spoil


def shorten(truth, photons):
    photons[3]["t"] = photons[3]["t"][:-1]


def other_detector(truth, photons):
    photons[2]["sensor_pos_y"] += 90


@pytest.mark.parametrize("spoil, words", [
    (spoil_photon("t", np.nan), ["row 3", "t is nan"]), (spoil_photon("t", -5.0), ["row 3", "t is -5.0"]),
    (spoil_photon("t", 1e20), ["row 3", "t is 1e+20"]),
    (spoil_photon("sensor_pos_z", -90.0), ["row 3", ", -90.00, where", " m away", "another detector"]),
    (spoil_photon("sensor_pos_x", np.nan), ["row 3", "at nan, ", "another detector"]),
    (other_detector, ["row 2", "no DOM (the nearest is "]), (shorten, ["row 3", "photons.sensor_pos_x"]),
    (spoil_truth("initial_state_zenith", np.nan), ["row 3", "initial_state_zenith is nan"]),
    (spoil_truth("initial_state_zenith", 91.0), ["row 3", "initial_state_zenith is 91"]),
    (spoil_truth("initial_state_azimuth", np.inf), ["row 3", "initial_state_azimuth is inf"]),
    (spoil_truth("initial_state_energy", None), ["row 3", "no value", "initial_state_energy"]),
    (spoil_truth("final_state_zenith", [1.0, 1.0, 1.0]), ["row 3", "final_state_zenith is longer"]),
])
def test_hostile_photons_are_one_clear_line(tmp_path, spoil, words):
    write_geometry(tmp_path)
    events = list(make_photons(np.random.default_rng(7), 5, (9, 20)))
    write_photons(tmp_path / "files/a.parquet", events, spoil=spoil)
    line = user_error(TOOL, f"--input_dir={tmp_path}/files", f"--geometry={tmp_path}/sensor_geometry.csv",
                      f"--out_dir={tmp_path}/raw")
    assert "a.parquet" in line and all(text in line for text in words), line
    assert not (tmp_path / "raw/train_meta.parquet").exists()


def test_files_that_are_missing_or_of_another_kind(photons, straight, tmp_path):
    flags = [f"--geometry={photons[0]}/sensor_geometry.csv", f"--out_dir={tmp_path}/raw"]
    assert "holds no .parquet files" in user_error(TOOL, *flags, f"--input_dir={tmp_path}")
    shutil.copytree(photons[0] / "files", tmp_path / "files")
    flags.append(f"--input_dir={tmp_path}/files")
    shutil.copy(straight[0] / "train/batch_1.parquet", tmp_path / "files/0.parquet")
    assert "0.parquet: no column mc_truth.initial_state_energy" in user_error(TOOL, *flags)
    (tmp_path / "files/0.parquet").write_bytes((photons[0] / "files/0.parquet").read_bytes()[:5000])
    assert "0.parquet: not a readable parquet" in user_error(TOOL, *flags)
    assert "nothing.csv: no such file" in user_error(TOOL, *flags, "--geometry=nothing.csv")
    assert "did you mean 'flight'" in user_error(TOOL, *flags, "--angles=fligth")
    for path in (tmp_path / "files").iterdir():
        write_photons(path, [(1, 1, 1, np.zeros(0, int), np.zeros(0))] * 3)
    assert "no event with light in 4 files" in user_error(TOOL, *flags)


def test_an_old_config_of_prepare_is_told(tmp_path):
    (tmp_path / "old.py").write_text('# old\nsource = "prometheus"\n')
    assert "no knob source" in user_error("prepare.py", tmp_path / "old.py")
    assert "tools/prometheus.py" in run_ok("prepare.py", "--help").stdout


# ------------------------------------------------------------------------------
# Prometheus as MC, Kaggle as real data, and the other way round
# ------------------------------------------------------------------------------

def test_a_model_goes_from_one_to_the_other(demo_data, pretrained, tmp_path):
    geometry = demo_data.parent / "raw/sensor_geometry.csv"
    rng = np.random.default_rng(10)
    for i in range(2):
        write_photons(tmp_path / f"files/{i}.parquet", list(make_photons(rng, 60, (40, 300))))
    run_ok(TOOL, f"--input_dir={tmp_path}/files", f"--geometry={geometry}", f"--out_dir={tmp_path}/raw",
           "--events_per_batch=60")
    run_ok("prepare.py", f"--input_dir={tmp_path}/raw", f"--data_dir={tmp_path}/data",
           "--splits={'pretrain': (1, 1), 'val': (2, 2)}")
    run_ok("train.py", f"--data_dir={tmp_path}/data", *TINY_RUN, "--max_steps=2",
           f"--out_dir={tmp_path}/prometheus")
    run_ok("finetune.py", f"--data_dir={tmp_path}/data", f"--pretrained={pretrained[0]}/ckpt.pt", *KNOBS,
           "--train_split=pretrain", "--max_steps=2", f"--out_dir={tmp_path}/kaggle_to_prometheus")
    run_ok("finetune.py", f"--data_dir={demo_data}", f"--pretrained={tmp_path}/prometheus/ckpt.pt", *KNOBS,
           "--max_steps=2", f"--out_dir={tmp_path}/prometheus_to_kaggle")
    for name in ("kaggle_to_prometheus", "prometheus_to_kaggle"):
        assert (tmp_path / name / "result.txt").exists()
