"""tools/graphnet.py: databases of NuBench's layout, selections, other detectors, wrong input."""
import sqlite3

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest

from conftest import run_ok, user_error
from data import read_geometry_csv
from test_prometheus import (DEPTH, POSITION, STRING, angles_in_file, expected_pulses, make_tracks,
                             read_events, write_photons)

TOOL = "tools/graphnet.py"
LARGE = 2**60 + 1  # float64 would round event_no

def write_table(path, position, string=STRING):
    columns = {f"sensor_pos_{axis}": position[:, i] for i, axis in enumerate("xyz")}
    pq.write_table(pa.table(columns | {"sensor_string_id": string + 1.0}), path)

def write_database(path, events, angles="flight", pulsemaps=None, sql=()):
    """Write events, {event_no: as make_tracks has them}, the last one first."""
    pulsemaps = pulsemaps or dict.fromkeys(events, "merged_photons")
    database = sqlite3.connect(path)
    database.execute("CREATE TABLE mc_truth (event_no INTEGER PRIMARY KEY, initial_state_type, "
                     "initial_state_azimuth, initial_state_zenith, initial_state_energy, "
                     "interaction)")
    for table in {*pulsemaps.values()}:
        database.execute(f"CREATE TABLE {table} (sensor_pos_x, sensor_pos_y, sensor_pos_z, t, "
                         "charge, event_no)")
    for number, (azimuth, zenith, energy, dom, time) in reversed(events.items()):
        truth = number, 14, *angles_in_file(azimuth, zenith, angles), energy, 1
        database.execute("INSERT INTO mc_truth VALUES (?, ?, ?, ?, ?, ?)", truth)
        rows = np.column_stack([POSITION[dom] + DEPTH, time, 1 + dom % 3]).tolist()
        database.executemany(f"INSERT INTO {pulsemaps[number]} VALUES (?, ?, ?, ?, ?, {number})",
                             rows)
    for line in sql:
        database.execute(line)
    database.commit()
    database.close()

@pytest.fixture(scope="module")
def nubench(tmp_path_factory):
    """40 tracks and 5 events without light in two databases -> events by event_no, options."""
    folder = tmp_path_factory.mktemp("nubench")
    events = dict(enumerate(make_tracks(4, ([200] * 8 + [0]) * 5), start=LARGE))
    bad = [f"INSERT INTO merged_photons SELECT sensor_pos_x, sensor_pos_y, sensor_pos_z, t, "
           f"{charge}, {number} FROM merged_photons LIMIT 9"
           for charge, number in ((-1, LARGE), (1e30, LARGE), (0, LARGE + 8))]
    write_database(folder / "1 a.db", dict([*events.items()][:20]), sql=bad)
    write_database(folder / "2.db", dict([*events.items()][20:]))
    write_table(folder / "table.parquet", POSITION + DEPTH)
    return events, [f"--database={folder}/1 a.db+{folder}/2.db", "--pulsemap=merged_photons",
                    f"--geometry={folder}/table.parquet", "--selections={}"]

def test_pulses_are_those_of_the_databases(nubench, tmp_path):
    events, options = nubench
    done = run_ok(TOOL, *options, "--events_per_batch=16", "--val_share=0",
                  f"--out_dir={tmp_path}/raw")
    written = read_events(tmp_path / "raw")
    lit = {number: event for number, event in events.items() if len(event[3])}
    assert list(written) == list(lit)  # LARGE, LARGE + 1, ...
    assert "NaN: 18 pulses without a charge in p.e., 5 events without light\n" in done.stdout
    assert "angles = 'flight': confirmed by the light of 40 tracks" in done.stdout
    assert "--splits=\"{'pretrain': (1, 2), 'val': (3, 3)}\"" in done.stdout
    for number, (azimuth, zenith, energy, dom, time) in lit.items():
        row, pulses = written[number]
        assert sorted(pulses) == sorted(expected_pulses(number, dom, time, 1.0 + dom % 3))
        assert np.allclose([row["azimuth"], row["zenith"]], [azimuth, zenith], atol=1e-12)
        assert row["energy"] == energy and row["event_class"] == 1
    line = user_error(TOOL, *options, options[0] + options[0][options[0].index("+"):])
    assert f"event_no {LARGE + 20} must be in table mc_truth once, not 2 times" in line

def test_selections_become_splits(nubench, tmp_path):
    """NuBench has events to train on in one pulsemap, to test on in another; val is drawn."""
    events, options = nubench
    numbers = [number for number, event in events.items() if len(event[3])]
    test, train = numbers[::4], sorted({*numbers} - {*numbers[::4]})
    pulsemaps = dict.fromkeys(events, "merged_photons") | dict.fromkeys(test, "pulses_no_noise")
    write_database(tmp_path / "a.db", events, "source", pulsemaps)
    pq.write_table(pa.table({"event_no": train[::-1]}), tmp_path / "train.parquet")
    pa.csv.write_csv(pa.table({"event_no": test}), tmp_path / "test.csv")
    options = [*options, f"--database={tmp_path}/a.db", "--events_per_batch=10", "--val_share=0.3",
               "--pulsemap=merged_photons+pulses_no_noise", f"--out_dir={tmp_path}/raw"]
    selections = {"pretrain": f"{tmp_path}/train.parquet", "test": f"{tmp_path}/test.csv"}
    done = run_ok(TOOL, *options, f"--selections={selections}", "--angles=flight")
    assert "{'pretrain': (1, 3), 'test': (4, 4), 'val': (5, 5)}" in done.stdout
    assert "of 40 tracks contradicts it" in done.stdout and "=source\n" in done.stdout
    written = read_events(tmp_path / "raw")
    val = [number for number, (row, _) in written.items() if row["batch_id"] == 5]
    assert sorted({*written} - {*test}) == train and [*written][-10 - len(val):-len(val)] == test
    assert val == sorted(val) and val[0] < train[10] < train[20] < val[-1]
    selections["test"], options[-1] = selections["pretrain"], f"--out_dir={tmp_path}/b"
    assert "are in two of them" in user_error(TOOL, *options, f"--selections={selections}")
    assert "2 tables for 1 selections" in user_error(TOOL, *options)

def test_names_of_icecube_hlc_and_what_is_unknown(nubench, tmp_path):
    events = {i: nubench[0][LARGE + i] for i in range(3)}
    write_database(tmp_path / "a.db", events, sql=[
        "ALTER TABLE merged_photons RENAME COLUMN t TO dom_time",
        "ALTER TABLE merged_photons RENAME COLUMN sensor_pos_x TO dom_x",
        "ALTER TABLE mc_truth RENAME COLUMN initial_state_type TO pid",
        "ALTER TABLE mc_truth RENAME COLUMN initial_state_azimuth TO azimuth",
        "ALTER TABLE mc_truth RENAME COLUMN initial_state_zenith TO zenith",
        "ALTER TABLE merged_photons ADD COLUMN hlc", "UPDATE merged_photons SET hlc = rowid % 2",
        "UPDATE merged_photons SET charge = NULL", "UPDATE mc_truth SET initial_state_energy = 0",
        "UPDATE mc_truth SET pid = 16 WHERE event_no = 1",
        "UPDATE mc_truth SET interaction = 2 WHERE event_no = 2"])
    options = [*nubench[1], f"--database={tmp_path}/a.db", f"--out_dir={tmp_path}/raw"]
    assert "angles = 'source': the light of 2 tracks does not say" in user_error(TOOL, *options)
    assert "NaN: 3 events without an energy\n" in run_ok(TOOL, *options, "--angles=flight").stdout
    written = read_events(tmp_path / "raw")
    for number, (_, _, _, dom, time) in events.items():
        wanted = expected_pulses(number, dom, time, np.ones(200), np.arange(200) % 2 == 0)
        assert sorted(written[number][1]) == sorted(wanted)
    assert [written[i][0]["event_class"] for i in range(3)] == [1, 0, 2]
    assert np.isnan([row["energy"] for row, _ in written.values()]).all()

@pytest.mark.parametrize("name", ["table.parquet", "prometheus.geo"])
def test_another_detector_counts_depth_from_elsewhere(tmp_path, name):
    """tools/prometheus.py finds the DOMs 2,500 m deep; a tank at the surface is left out."""
    events, depth = make_tracks(3, [50, 300]), [0, 0, -2500]
    place, string = np.insert(POSITION + depth, 700, 5, axis=0), np.insert(STRING, 700, 99)
    write_table(tmp_path / "table.parquet", place, string)
    np.savetxt(tmp_path / "prometheus.geo", np.column_stack([place, string, string]), comments="",
               header="### Metadata ###\nMedium:\tice\n### Modules ###", delimiter="\t")
    def edit(truth, photons):
        photons[1] = {name: np.append(values, 5) for name, values in photons[1].items()}
    write_photons(tmp_path / "files/a.parquet", events, depth=depth, edit=edit)
    done = run_ok("tools/prometheus.py", f"--input_dir={tmp_path}/files", "--angles=flight",
                  f"--geometry={tmp_path}/{name}", f"--out_dir={tmp_path}/raw", "--merge_window=0")
    assert f"{name}: left out 1 rows at z = 5 to 5 m\n{tmp_path}/{name}: z is measured from " \
           "-2,500.00 m\n" in done.stdout
    assert "NaN: 1 pulses at left-out rows\n" in done.stdout
    for number, (_, pulses) in read_events(tmp_path / "raw").items():
        dom, time = events[number - 10_000_000][3:]
        assert pulses == expected_pulses(number, dom, time, np.ones(len(dom)))
    assert np.array_equal(read_geometry_csv(tmp_path / "raw/sensor_geometry.csv")[0], POSITION)
    write_table(tmp_path / "km.parquet", POSITION / 1000)
    assert "needs positions in m" in user_error(TOOL, f"--geometry={tmp_path}/km.parquet")

@pytest.mark.parametrize("sql, words", [
    ("ALTER TABLE mc_truth RENAME COLUMN initial_state_zenith TO u",
     "mc_truth: no column initial_state_zenith or injection_zenith or zenith, only event_no"),
    ("UPDATE merged_photons SET sensor_pos_x = sensor_pos_x + 30", "the nearest DOM is 30.0 m"),
    ("UPDATE merged_photons SET t = NULL", "event 7: 200 of 200 pulses without a time"),
    ("UPDATE mc_truth SET initial_state_zenith = 91", "1 of 1 events without angles in radians"),
    ("UPDATE mc_truth SET interaction = 2", "of 0 tracks does not say whether it is right; set")])
def test_a_wrong_database_is_one_line(nubench, tmp_path, sql, words):
    write_database(tmp_path / "a.db", {7: nubench[0][LARGE]}, sql=[sql])
    line = user_error(TOOL, *nubench[1], f"--database={tmp_path}/a.db", f"--out_dir={tmp_path}/raw")
    assert words in line and not (tmp_path / "raw").exists()
