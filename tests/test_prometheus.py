"""tools/prometheus.py: pulses, times, labels, which way the angles point, input that is wrong."""
import shlex

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from conftest import run_ok, user_error
from data import open_split, read_geometry_csv, uniform_hash
from tools.kaggle_layout import READINGS

TOOL = "tools/prometheus.py"
STRING = np.repeat(np.arange(25), 30)
POSITION = np.stack([60.5 * (STRING // 5 - 2), 60.5 * (STRING % 5 - 2),
                     217.5 - 15 * (np.arange(750) % 30)], axis=1)  # (750, 3)
DEPTH = [0, 0, -1948.07]  # [m] from the middle to where Prometheus counts from
FINAL_STATES = [13, -2000001006], [-11, -2000001006], [-15, -2000001006]  # event_class 1, 2, 0

def make_tracks(seed, lengths):
    """Return (azimuth, zenith) of the source, energy, DOMs and times of the photons of tracks."""
    rng, events = np.random.default_rng(seed), []
    for n in lengths:
        azimuth, zenith = rng.uniform(0, 2 * np.pi), np.arccos(rng.uniform(-0.9, 0.9))
        x, y = np.cos(azimuth) * np.sin(zenith), np.sin(azimuth) * np.sin(zenith)
        away = POSITION - rng.uniform(-60, 60, 3)
        along = away @ [-x, -y, -np.cos(zenith)]
        distance = np.sqrt(np.maximum((away**2).sum(axis=1) - along**2, 1))
        light = np.exp(-distance / 20)
        dom = rng.choice(750, n, p=light / light.sum())
        time = 4000 + along[dom] / 0.3 + distance[dom] / 0.22 + rng.exponential(30, n)
        events.append((azimuth, zenith, 10 ** rng.uniform(2, 6), dom, np.round(time)))
    return events

def angles_in_file(azimuth, zenith, angles):
    """Return the angles of a source in the sense of the option."""
    along_azimuth, along_zenith = np.array(READINGS[angles]) == 1
    return azimuth - np.pi * along_azimuth, np.pi - zenith if along_zenith else zenith

def write_photons(path, events, angles="flight", depth=DEPTH, edit=lambda *_: 0):
    truth, photons = [], []
    for i, (azimuth, zenith, energy, dom, time) in enumerate(events):
        azimuth, zenith = angles_in_file(azimuth, zenith, angles)
        truth.append({"initial_state_energy": energy, "initial_state_azimuth": azimuth,
                      "initial_state_zenith": zenith, "final_state_type": FINAL_STATES[i % 3]})
        x, y, z = (POSITION[dom] + depth).T
        photons.append({"sensor_pos_x": x, "sensor_pos_y": y, "sensor_pos_z": z, "t": time})
    edit(truth, photons)
    struct = pa.struct([(name, pa.large_list(pa.float64())) for name in photons[0]])
    table = pa.table({"mc_truth": pa.array(truth), "photons": pa.array(photons, struct)})
    path.parent.mkdir(exist_ok=True)
    pq.write_table(table, path, row_group_size=7)

def expected_pulses(event_id, dom, time, charge, hlc=None):
    """Return the rows (DOM, time, charge, aux, event_id) of one event, pulse by pulse."""
    apart = np.abs(dom[:, None] - dom)
    near = (STRING[dom][:, None] == STRING[dom]) & (apart >= 1) & (apart <= 2)
    near &= np.abs(time[:, None] - time) <= 1000
    hlc = near.any(axis=1) if hlc is None else hlc
    start = time[hlc].min() if hlc.any() else time.min()
    shake = np.rint(300 * (2 * uniform_hash(0, np.array([event_id]), np.int64(0))[0] - 1))
    shifted = np.rint(time + max(10_000 + shake - start, -time.min())).astype(int)
    order = np.lexsort((dom, time))
    return [(dom[i], shifted[i], charge[i], not hlc[i], event_id) for i in order]

def merge(dom, time, window):
    """Merge photon by photon -> DOM, time, charge of the pulses."""
    pulses = [[-1, 0, 0]]
    for d, t in sorted(zip(dom.tolist(), time.tolist())):
        if window and pulses[-1][0] == d and t - pulses[-1][1] <= window:
            pulses[-1][2] += 1
        else:
            pulses.append([d, t, 1])
    dom, time, charge = np.array(pulses[1:]).T
    return dom.astype(int), time, charge

def read_events(folder):
    """Return {event_id: (row of the meta table, rows of its pulses)}."""
    events = {}
    for row in pq.read_table(folder / "train_meta.parquet").to_pylist():
        table = pq.read_table(folder / f"train/batch_{row['batch_id']}.parquet")
        first, end = row["first_pulse_index"], row["last_pulse_index"] + 1
        pulses = table.slice(first, end - first).to_pydict()
        events[row["event_id"]] = row, [*zip(*pulses.values())]
    return events

@pytest.fixture(scope="module")
def photons(tmp_path_factory):
    """Two files of tracks -> events by event_id, options."""
    folder, events = tmp_path_factory.mktemp("photons"), {}
    rows = [f"{dom},{x},{y},{z}" for dom, (x, y, z) in enumerate(POSITION.tolist())]
    (folder / "geometry.csv").write_text("\n".join(["sensor_id,x,y,z", *rows, ""]))
    def edit(truth, photons):  # add photons that must be left out
        truth[18]["initial_state_zenith"] = truth[18]["initial_state_energy"] = None
        for i, name, value in ((0, "t", np.nan), (2, "t", -1), (3, "t", -1e9),
                               (4, "sensor_pos_z", np.nan), (5, "sensor_pos_x", -1)):
            photons[i] = {name: np.append(x, x[0]) for name, x in photons[i].items()}
            photons[i][name][-1] = value
    for number in (1, 2):
        tracks = make_tracks(number, [300, 0, 100, 127, 900, 1] * 4 + [2] * 80)
        write_photons(folder / f"files/{number}.parquet", tracks, "zenith_flight", edit=edit)
        events |= enumerate(tracks, start=number * 10_000_000)
    return events, [f"--input_dir={folder}/files", f"--geometry={folder}/geometry.csv",
                    "--angles=zenith_flight", "--events_per_batch=75"]

@pytest.mark.parametrize("window", [0, 3, 50])
def test_pulses_are_those_of_the_slow_form(photons, tmp_path, window):
    events, options = photons
    done = run_ok(TOOL, *options, f"--merge_window={window}", f"--out_dir={tmp_path}/raw")
    written = read_events(tmp_path / "raw")
    lit = {key: event for key, event in events.items() if len(event[3])}
    assert list(written) == list(lit) and "confirmed by the light of " in done.stdout
    assert [row["batch_id"] for row, _ in written.values()] == [1] * 75 + [2] * 75 + [3] * 50
    assert ("NaN: 4 pulses at no DOM of --geometry, 6 pulses without a time within 1e+06 ns, "
            "8 events without light, 2 events without angles in radians, 2 even") in done.stdout
    for event_id, (azimuth, zenith, energy, dom, time) in lit.items():
        (row, pulses), number = written[event_id], event_id % 10**7
        assert pulses == expected_pulses(event_id, *merge(dom, time, window))
        labels = [row["azimuth"], row["zenith"], row["energy"]]
        wanted = [azimuth, zenith, energy] if number != 18 else [np.nan] * 3
        assert np.allclose(labels, wanted, atol=1e-12, equal_nan=True)
        assert row["event_class"] == (1, 2, 0)[number % 3]
    position, string = read_geometry_csv(tmp_path / "raw/sensor_geometry.csv")
    assert np.array_equal(position, POSITION) and np.array_equal(string, STRING)

@pytest.mark.parametrize("right", READINGS)
def test_the_light_says_which_option_is_right(photons, tmp_path, right):
    events = make_tracks(9, [300] * 40)
    write_photons(tmp_path / "files/a.parquet", events, right)
    advice = f"contradicts it; convert again with --angles={right}"
    for angles in ("auto", *READINGS):
        options = [*photons[1], f"--input_dir={tmp_path}/files", f"--out_dir={tmp_path}/{angles}",
                   f"--angles={angles}"]
        if angles == "auto" and right != "flight":
            assert user_error(TOOL, *options).endswith(advice) and not (tmp_path / angles).exists()
            continue
        done = run_ok(TOOL, *options)
        written = read_events(tmp_path / angles).values()
        labels = [(row["azimuth"], row["zenith"]) for row, _ in written]
        is_right = angles in (right, "auto")
        assert np.allclose(labels, [event[:2] for event in events]) == is_right
        confirmed = f"angles = {right!r}: confirmed by the light of 27 tracks\n"
        assert (confirmed if is_right else f"{advice}\n") in done.stdout

def test_a_stopped_run_starts_over_and_a_complete_folder_is_left_alone(photons, tmp_path):
    options = [*photons[1], f"--out_dir={tmp_path}/a b_raw/"]
    (tmp_path / "a b_raw.part/train").mkdir(parents=True)
    (tmp_path / "a b_raw.part/train/batch_9.parquet").write_bytes(b"half")
    command = run_ok(TOOL, *options).stdout.splitlines()[-1]
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.parquet")}
    assert sorted(path.stem for path in before) == ["batch_1", "batch_2", "batch_3", "train_meta"]
    assert f"complete, nothing to do\n{command}" in run_ok(TOOL, *options).stdout
    line = user_error(TOOL, *options, "--angles=flight")
    assert "made with angles = 'zenith_flight'; choose another out_dir" in line
    assert all(path.read_bytes() == content for path, content in before.items())
    _, script, *args = shlex.split(command.removeprefix("next: "))
    assert args == [f"--input_dir={tmp_path}/a b_raw", f"--data_dir={tmp_path}/a b",
                    "--splits={'pretrain': (1, 2), 'val': (3, 3)}"]
    run_ok(script, *args, "--workers=1")
    assert len(open_split(tmp_path / "a b", "pretrain").events) == 150

@pytest.mark.parametrize("name, value, words", [
    ("t", np.nan, "event 10000003: 1 of 87 pulses without a time within 1e+06 ns"),
    ("sensor_pos_z", -90, "-90. ]: the nearest DOM is 7.5 m away"),
    ("initial_state_zenith", 91.0, "event 10000003: 1 of 6 events without angles in radians")])
def test_wrong_photons_are_one_line(photons, tmp_path, name, value, words):
    def edit(truth, photons):
        if name in truth[3]:
            truth[3][name] = value
        else:
            photons[3][name] = np.append(value, photons[3][name][1:])
    write_photons(tmp_path / "files/a.parquet", make_tracks(7, [9, 20] * 3), edit=edit)
    line = user_error(TOOL, *photons[1], f"--input_dir={tmp_path}/files",
                      f"--out_dir={tmp_path}/raw")
    assert "a.parquet: " in line and words in line and not (tmp_path / "raw").exists()
