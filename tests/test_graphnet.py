"""tools.graphnet as users run it, on databases of NuBench's layout that hold simulated events."""
import os
import re
import shlex
import shutil
import sqlite3
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest

import data
import simulate
from conftest import kill_when_there_is, run_ok, user_error
from test_prometheus import contents, make_photons, write_photons
from tools import graphnet, layout

TOOL = "tools.graphnet"
GEOMETRY = simulate.build_geometry()  # (5160, 3)
DEPTH = [0, 0, -1948.07]  # [m] from IceCube's centre to where Prometheus counts from


# ------------------------------------------------------------------------------
# databases, and what must come out of them
# ------------------------------------------------------------------------------

def simulated_events(raw):
    """The labelled events of a folder of simulate.py -> list of dicts, in order of event_id."""
    meta, events = pq.read_table(raw / "train_meta.parquet").to_pylist(), []
    for number in sorted({row["batch_id"] for row in meta}):
        table = pq.read_table(raw / f"train/batch_{number}.parquet")
        columns = {name: table[name].to_numpy() for name in ("sensor_id", "time", "charge", "auxiliary")}
        for row in meta:
            if row["batch_id"] == number:
                pulses = slice(row["first_pulse_index"], row["last_pulse_index"] + 1)
                events.append(row | {name: values[pulses] for name, values in columns.items()})
    return events


def write_database(path, events, hlc=True, angles="source", tables=lambda event: "merged_photons", sql=()):
    """NuBench's layout: events in no order, their pulses in order.

    tables: gives the pulsemap that an event is in. sql: statements to run at the end.
    """
    pulses = {"sensor_pos_x": 0, "sensor_pos_y": 1, "sensor_pos_z": 2, "t": 3, "charge": 4, "event_no": 6}
    pulses |= {"hlc": 5} if hlc else {}
    azimuth_sign, zenith_sign = layout.READINGS[angles]
    truth, rows = [], {}
    for i in np.random.default_rng(0).permutation(len(events)).tolist():
        event = events[i]
        position = GEOMETRY[event["sensor_id"]] + DEPTH
        columns = [*position.T, event["time"].astype(float), event["charge"],
                   (~event["auxiliary"]).astype(int), np.full(len(position), event["event_id"])]
        rows.setdefault(tables(event), []).extend(zip(*(columns[k].tolist() for k in pulses.values())))
        azimuth = event["azimuth"] + np.pi if azimuth_sign == 1 else event["azimuth"]
        zenith = np.pi - event["zenith"] if zenith_sign == 1 else event["zenith"]
        truth.append((event["event_id"], event["event_class"], event["energy"], 14, azimuth % (2 * np.pi),
                      zenith))
    database = sqlite3.connect(path)
    for name, content in rows.items():
        database.execute(f"CREATE TABLE {name} ({', '.join(pulses)})")
        database.executemany(f"INSERT INTO {name} VALUES ({', '.join('?' * len(pulses))})", content)
        database.execute(f"CREATE INDEX event_no_{name} ON {name} (event_no)")
    database.execute("CREATE TABLE mc_truth (event_no INTEGER PRIMARY KEY, interaction, "
                     "initial_state_energy, initial_state_type, initial_state_azimuth, initial_state_zenith)")
    database.executemany("INSERT INTO mc_truth VALUES (?, ?, ?, ?, ?, ?)", truth)
    for line in sql:
        database.execute(line)
    database.commit()
    database.close()


def write_table(path, position=GEOMETRY + DEPTH, string=np.arange(5160) // 60 + 1.0):
    """The DOMs as GraphNeT has them, strings from 1."""
    columns = {f"sensor_pos_{axis}": position[:, i] for i, axis in enumerate("xyz")}
    table = pa.table(columns | {"sensor_string_id": string, "sensor_id": np.arange(len(position))})
    (pa.csv.write_csv if path.suffix == ".csv" else pq.write_table)(table, path)
    return path


def coincidences(dom, time):
    """The rule, pulse by pulse."""
    apart = np.abs(dom[:, None] - dom)
    near = (dom[:, None] // 60 == dom // 60) & (apart >= 1) & (apart <= 2)
    return (near & (np.abs(time[:, None] - time) <= 1000)).any(axis=1)


def write_direct(raw, folder, hlc):
    """The folder of simulate.py with what must differ after a way through a database."""
    shutil.copytree(raw, folder)
    for path in (folder / "train").iterdir():
        table = pq.read_table(path)
        event_id, dom, times, aux = (table[name].to_numpy().copy()
                                     for name in ("event_id", "sensor_id", "time", "auxiliary"))
        for event in np.unique(event_id):
            here = event_id == event
            if not hlc:
                aux[here] = ~coincidences(dom[here].astype(int), times[here])
            first = times[here & ~aux].min() if (here & ~aux).any() else times[here].min()
            shake = np.rint(300 * (2 * data.uniform_hash(0, event, 0) - 1))
            times[here] += np.int64(max(10_000 + shake - first, -times[here].min()))
        for name, values in (("time", times), ("auxiliary", aux)):
            table = table.set_column(table.column_names.index(name), name, pa.array(values))
        pq.write_table(table, path)


@pytest.fixture(scope="module")
def raw(demo_data):
    return demo_data.parent / "raw"


@pytest.fixture(scope="module")
def events(raw):
    return simulated_events(raw)


@pytest.fixture(scope="module")
def nubench(events, tmp_path_factory):
    """A database, its geometry, the flags for them."""
    folder = tmp_path_factory.mktemp("nubench")
    write_database(folder / "merged.db", events)
    write_table(folder / "geometry.parquet")
    return folder, [f"--database={folder}/merged.db", f"--geometry={folder}/geometry.parquet",
                    "--pulsemap=merged_photons", "--selections={}", "--angles=source",
                    "--events_per_batch=100"]


@pytest.fixture(scope="module")
def straight(nubench, tmp_path_factory):
    """A run that nothing disturbed."""
    out_dir = tmp_path_factory.mktemp("straight") / "raw"
    return out_dir, run_ok(TOOL, *nubench[1], f"--out_dir={out_dir}", "--workers=1")


def printed_splits(done):
    line = done.stdout.splitlines()[-1]
    assert line.startswith("to go on, run: python prepare.py --input_dir=")
    return line, eval(re.search(r"--splits=\"(.*)\"$", line)[1])


# ------------------------------------------------------------------------------
# what is written
# ------------------------------------------------------------------------------

@pytest.mark.parametrize("hlc", [True, False])
def test_the_way_through_a_database_gives_the_bytes_of_the_direct_way(raw, events, nubench, tmp_path, hlc):
    """simulate.py -> database -> prepare.py against simulate.py -> prepare.py: what is in the .bin files.

    Equal to the last bit: DOMs and their strings (found by position, in a table that counts z from another
    origin), charges, labels, classes, the order of pulses, and which of them are kept. Two things differ by
    definition, and write_direct does them too: the clock is set by the first coincidence anew; and without
    hlc, a pulse whose neighbour fell outside of the readout is in coincidence no more.
    """
    database = nubench[0] / "merged.db"
    if not hlc:
        database = tmp_path / "merged.db"
        write_database(database, events, hlc=False)
    run_ok(TOOL, *nubench[1], f"--database={database}", "--val_share=0", f"--out_dir={tmp_path}/raw")
    write_direct(raw, tmp_path / "direct", hlc)
    for name, n in (("raw", 6), ("direct", 4)):
        run_ok("prepare.py", f"--input_dir={tmp_path}/{name}", f"--data_dir={tmp_path}/{name}_data",
               f"--splits={{'all': (1, {n})}}", "--max_pulses=60")
    found, direct = (contents(tmp_path / name) for name in ("raw_data", "direct_data"))
    assert len(data.open_split(tmp_path / "raw_data", "all")) == len(events)
    for name in ("geometry.bin", "all_events.bin", "all_pulses.bin"):
        assert found[name] == direct[name], name
    before, after = (np.concatenate([event["auxiliary"] for event in simulated_events(folder)])
                     for folder in (raw, tmp_path / "raw"))
    changed = np.mean(before != after)
    assert changed == 0 if hlc else 0 < changed < 0.01


def test_charge_is_1_and_events_without_pulses_are_left_out(events, nubench, tmp_path):
    dark = [events[i]["event_id"] for i in (0, 100, 101, 552)]
    write_database(tmp_path / "merged.db", events, sql=[
        f"DELETE FROM merged_photons WHERE event_no IN ({', '.join(map(str, dark))})",
        "ALTER TABLE merged_photons RENAME COLUMN charge TO something",
        "ALTER TABLE mc_truth RENAME COLUMN initial_state_energy TO something",
        "UPDATE mc_truth SET initial_state_type = 16 WHERE event_no % 3 = 0",
        "UPDATE mc_truth SET initial_state_type = -12 WHERE event_no % 3 = 1"])
    done = run_ok(TOOL, *nubench[1], f"--database={tmp_path}/merged.db", f"--out_dir={tmp_path}/raw")
    assert " 549 events, " in done.stdout and "; 4 events without a pulse were left out" in done.stdout
    meta = pq.read_table(tmp_path / "raw/train_meta.parquet").to_pylist()
    assert not set(dark) & {row["event_id"] for row in meta}
    assert np.isnan([row["energy"] for row in meta]).all()
    assert (pq.read_table(tmp_path / "raw/train/batch_1.parquet")["charge"].to_numpy() == 1).all()
    was_track = {event["event_id"]: event["event_class"] == 1 for event in events}
    for row in meta:  # of charged current: a tau is unknown, an electron a cascade, a muon a track
        wanted = (0, 2, 1)[row["event_id"] % 3] if was_track[row["event_id"]] else 2
        assert row["event_class"] == wanted


def test_names_of_icecube(straight, nubench, events, tmp_path):
    """A database and a geometry (csv) as GraphNeT has them for IceCube: other names, another origin."""
    renamed = [f"ALTER TABLE merged_photons RENAME COLUMN {old} TO {new}" for old, new in (
        ("sensor_pos_x", "dom_x"), ("sensor_pos_y", "dom_y"), ("sensor_pos_z", "dom_z"), ("t", "dom_time"))]
    renamed += [f"ALTER TABLE mc_truth RENAME COLUMN {old} TO {new}" for old, new in (
        ("initial_state_energy", "energy"), ("initial_state_type", "pid"),
        ("initial_state_azimuth", "azimuth"), ("initial_state_zenith", "zenith"),
        ("interaction", "interaction_type"))]
    write_database(tmp_path / "a.db", events, sql=[
        *renamed, "UPDATE merged_photons SET dom_z = dom_z + 1948.07", "ALTER TABLE mc_truth RENAME TO truth",
        "ALTER TABLE merged_photons RENAME TO [SRT In-Ice]"])
    text = write_table(tmp_path / "table.csv", GEOMETRY).read_text()
    text = text.replace("sensor_pos_", "dom_").replace("sensor_string_id", "string")
    (tmp_path / "table.csv").write_text(text)
    run_ok(TOOL, *nubench[1], f"--database={tmp_path}/a.db", f"--geometry={tmp_path}/table.csv",
           "--truth=truth", "--pulsemap=SRT In-Ice", f"--out_dir={tmp_path}/raw")
    found, expected = contents(tmp_path / "raw"), contents(straight[0])
    assert found.pop("graphnet.json") != expected.pop("graphnet.json")
    assert found == expected


def test_another_detector(tmp_path):
    """Strings of other lengths and numbers, z from the sea floor; an event is found by its positions."""
    x = np.array([0, 0, 0, 0, 0, 40.5, 40.5, 40.5])
    z = np.array([0, 9, 18, 27, 36, 230, 240, 250.0])
    string = np.array([3, 3, 3, 3, 3, 8, 8, 8.0])
    write_table(tmp_path / "table.parquet", np.stack([x, -x, z], axis=1), string)
    detector, places = layout.read_doms(tmp_path / "table.parquet")
    assert np.array_equal(detector.position[2], z - 125) and detector.string.tolist() == [0] * 5 + [1] * 3
    assert layout.find_doms(np.array([x, -x, z]) + 0.3, places, 8, {}).tolist() == list(range(8))
    assert layout.find_doms(np.array([x, -x, z - 125]), places, 8, {}).tolist() == [-1] * 8
    with sqlite3.connect(tmp_path / "a.db") as database:
        database.execute("CREATE TABLE total (event_no, sensor_pos_x, sensor_pos_y, sensor_pos_z, t)")
        database.execute("CREATE INDEX i ON total (event_no, t)")
        database.execute("CREATE TABLE mc_truth (event_no INT, injection_azimuth, injection_zenith)")
        database.execute("CREATE UNIQUE INDEX j ON mc_truth (event_no)")
        # DOM 4 has a neighbour two places down, DOM 5 is on another string, DOM 0 was seen too late
        for dom, t in ((4, 1e9 + 100.0), (2, 1e9 + 1100.0), (5, 1e9 + 0.5), (0, 1e9 + 2101.0)):
            database.execute("INSERT INTO total VALUES (7, ?, ?, ?, ?)", (x[dom], -x[dom], z[dom], t))
        database.execute("INSERT INTO mc_truth VALUES (7, 1.0, 2.0)")
    run_ok(TOOL, f"--database={tmp_path}/a.db", "--pulsemap=total", f"--geometry={tmp_path}/table.parquet",
           "--selections={}", f"--out_dir={tmp_path}/raw")
    table = pq.read_table(tmp_path / "raw/train/batch_1.parquet").to_pydict()
    assert table["sensor_id"] == [5, 4, 2, 0] and table["auxiliary"] == [True, False, False, True]
    assert np.diff(table["time"]).tolist() in ([99, 1000, 1001], [100, 1000, 1001])
    row, = pq.read_table(tmp_path / "raw/train_meta.parquet").to_pylist()
    assert row["event_id"] == 7 and row["event_class"] == 0 and np.isnan(row["energy"])
    assert np.allclose([row["azimuth"], row["zenith"]], [1 + np.pi, np.pi - 2])
    run_ok("prepare.py", f"--input_dir={tmp_path}/raw", f"--data_dir={tmp_path}/data",
           "--splits={'val': (1, 1)}")
    assert np.array_equal(data.read_geometry(tmp_path / "data")["string"], detector.string)


@pytest.mark.parametrize("chunk", [50, 2000])
def test_events_are_whole_however_the_rows_are_cut(nubench, monkeypatch, chunk):
    monkeypatch.setattr(graphnet, "count_events", lambda n: None)  # it counts for a bar, in workers
    config = graphnet.GraphnetConfig(database=f"{nubench[0]}/merged.db", angles="source")
    geometry = layout.read_doms(nubench[0] / "geometry.parquet")
    database = sqlite3.connect(config.database)
    event_no = graphnet.events_with_pulses(database, "merged_photons")[20:90]

    def read():
        return list(graphnet.convert_events(config, *geometry, "merged_photons", event_no, []))
    (events, pulses), = read()
    assert np.array_equal(events["event_id"], event_no) and len(pulses) > 2000
    monkeypatch.setattr(graphnet, "CHUNK", chunk)
    pieces = read()
    assert len(pieces) > 2
    assert pa.concat_tables(piece[0] for piece in pieces).equals(events)
    assert pa.concat_tables(piece[1] for piece in pieces).equals(pulses)


def test_photon_files_of_another_detector(tmp_path):
    """tools.prometheus finds DOMs as this tool does: the same pulses, 100 m higher, by GraphNeT's table."""
    def lift(truth, photons):
        for row in photons:
            row["sensor_pos_z"] = row["sensor_pos_z"] + 100
    events = list(make_photons(np.random.default_rng(3), 6, (50, 300)))
    tables = {"icecube": (GEOMETRY + DEPTH, None), "other": (GEOMETRY + DEPTH + [0, 0, 100], lift)}
    for name, (position, spoil) in tables.items():
        write_photons(tmp_path / f"{name}/a.parquet", events, spoil=spoil)
        table = write_table(tmp_path / f"{name}.csv", position)
        run_ok("tools.prometheus", f"--input_dir={tmp_path}/{name}", f"--geometry={table}",
               f"--out_dir={tmp_path}/{name}_raw")
    icecube, other = (contents(tmp_path / f"{name}_raw") for name in tables)
    for name in ("train/batch_1.parquet", "train_meta.parquet"):
        assert icecube[name] == other[name]
    assert icecube["sensor_geometry.csv"] != other["sensor_geometry.csv"]  # z from its middle


# ------------------------------------------------------------------------------
# selections and splits, angles
# ------------------------------------------------------------------------------

def test_selections_become_splits(events, nubench, tmp_path):
    """NuBench's way: events to train on in one pulsemap, to test on in another; some are drawn for val."""
    numbers = np.array([event["event_id"] for event in events])
    test, train = numbers[::3], np.setdiff1d(numbers, numbers[::3])
    write_database(tmp_path / "a.db", events, tables=lambda event: (
        "pulses_no_noise" if event["event_id"] in test else "merged_photons"))
    chosen = np.random.default_rng(1).permutation(train)[:300]
    pq.write_table(pa.table({"event_no": chosen, "other": chosen}), tmp_path / "train.parquet")
    pa.csv.write_csv(pa.table({"event_no": test[:120]}), tmp_path / "test.csv")
    flags = [*nubench[1], f"--database={tmp_path}/a.db", "--pulsemap=merged_photons+pulses_no_noise",
             f"--selections={{'pretrain': '{tmp_path}/train.parquet', 'test': '{tmp_path}/test.csv'}}"]
    done = run_ok(TOOL, *flags, f"--out_dir={tmp_path}/raw")
    command, splits = printed_splits(done)
    assert splits == {"pretrain": (1, 3), "val": (4, 4), "test": (5, 6)} and " 420 events, " in done.stdout
    program, *arguments = shlex.split(command.partition("run: python ")[2])
    run_ok(program, *arguments, f"--data_dir={tmp_path}/data")
    found = {split: data.open_split(tmp_path / "data", split).events["event_id"] for split in splits}
    assert np.array_equal(found["test"], test[:120])
    assert np.array_equal(np.sort(np.concatenate([found["pretrain"], found["val"]])), np.sort(chosen))
    place = np.searchsorted(train, found["val"]) / len(train)  # they come from everywhere
    assert 15 <= len(place) <= 45 and place.min() < 0.2 and place.max() > 0.8 and (np.diff(place) > 0).all()

    flags[-1] = f"--selections={{'val': '{tmp_path}/test.csv', 'labels': '{tmp_path}/train.parquet'}}"
    done = run_ok(TOOL, *flags, "--pulsemap=pulses_no_noise+merged_photons", f"--out_dir={tmp_path}/named")
    assert printed_splits(done)[1] == {"val": (1, 2), "labels": (3, 5)}  # val has a selection: none is drawn


def test_the_light_tells_which_way_the_angles_point(straight, events, nubench, tmp_path):
    assert "angles = 'source': confirmed by the light of 6 files (batch_1.parquet, ...)" in straight[1].stdout
    write_database(tmp_path / "a.db", events, angles="zenith_flight")
    flags = [*nubench[1], f"--database={tmp_path}/a.db", "--events_per_batch=400"]
    for done in (run_ok(TOOL, *flags, f"--out_dir={tmp_path}/raw") for _ in range(2)):
        warnings = [line for line in done.stderr.splitlines() if line.startswith("warning: ")]
        first = "complete" not in done.stdout
        assert len(warnings) == 1 + first and ("light of 1 file (batch_1.parquet)" in warnings[0]) == first
        assert warnings[-1].startswith("warning: angles = 'source' contradicts the light of 3 files")
        assert warnings[-1].endswith("--angles=zenith_flight")
    right = run_ok(TOOL, *flags, "--angles=zenith_flight", f"--out_dir={tmp_path}/right")
    assert "confirmed by the light" in right.stdout and "warning" not in right.stderr
    for label in ("azimuth", "zenith"):
        columns = [np.sort(pq.read_table(folder / "train_meta.parquet")[label].to_numpy())
                   for folder in (straight[0], tmp_path / "right")]
        np.testing.assert_allclose(*columns, atol=1e-12)


# ------------------------------------------------------------------------------
# workers, interruptions, settings
# ------------------------------------------------------------------------------

def test_the_bytes_do_not_depend_on_the_workers(nubench, straight, tmp_path):
    run_ok(TOOL, *nubench[1], f"--out_dir={tmp_path}/raw", "--workers=3")
    assert contents(tmp_path / "raw") == contents(straight[0])


def test_a_complete_folder_is_left_alone(nubench, straight, tmp_path):
    shutil.copytree(straight[0], tmp_path / "raw")
    shutil.copytree(nubench[0], tmp_path / "moved")  # files may move
    flags = [flag.replace(str(nubench[0]), f"{tmp_path}/moved") for flag in nubench[1]]
    flags.append(f"--out_dir={tmp_path}/raw")
    done = run_ok(TOOL, *flags)
    assert "complete, nothing to do" in done.stdout and "event/s" not in done.stderr
    assert printed_splits(done)[1] == printed_splits(straight[1])[1] == {"pretrain": (1, 5), "val": (6, 6)}
    pq.write_table(pa.table({"event_no": [1]}), tmp_path / "one.parquet")
    write_table(tmp_path / "other.parquet", GEOMETRY + [0, 0, 3])
    for flag, words in (("--seed=1", "seed = 0"), ("--val_share=0.2", "val_share = 0.1, now it is 0.2"),
                        (f"--geometry={tmp_path}/other.parquet", "geometry = 'DOMs with crc32 "),
                        (f"--selections={{'a': '{tmp_path}/one.parquet'}}", "now it is {'a': '1 events")):
        line = user_error(TOOL, *flags, flag)
        assert words in line and "choose another out_dir" in line, line
    with sqlite3.connect(tmp_path / "moved/merged.db") as database:
        database.execute("UPDATE merged_photons SET charge = 2 * charge")
    assert "made with database = " in user_error(TOOL, *flags)
    shutil.copy(nubench[0] / "merged.db", tmp_path / "moved/merged.db")
    assert contents(tmp_path / "raw") == contents(straight[0])
    (tmp_path / "raw/train/batch_2.parquet").unlink()
    run_ok(TOOL, *flags)
    assert contents(tmp_path / "raw") == contents(straight[0])
    (tmp_path / "raw/graphnet.json").unlink()
    assert "did not write" in user_error(TOOL, *flags)


def test_killed_and_gone_on_is_as_never_killed(nubench, tmp_path):
    flags = [*nubench[1], "--events_per_batch=20", "--workers=1"]
    command = [sys.executable, "-m", TOOL, *flags, f"--out_dir={tmp_path}/a"]
    assert kill_when_there_is("batch_*.json", tmp_path / "a/.parts", *command) < 25
    assert "seed = 0, now it is 1" in user_error(TOOL, *flags, f"--out_dir={tmp_path}/a", "--seed=1")
    run_ok(TOOL, *flags, f"--out_dir={tmp_path}/a")
    run_ok(TOOL, *flags, f"--out_dir={tmp_path}/b", "--workers=2")
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_stopped_before_the_meta_table(nubench, straight, tmp_path, monkeypatch):
    flags, replace = [*nubench[1], f"--out_dir={tmp_path}/raw"], os.replace

    def stop(source, target):
        if str(target).endswith("train_meta.parquet"):
            raise KeyboardInterrupt
        replace(source, target)
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", stop)
        with pytest.raises(AssertionError, match="give the same command again"):
            run_ok(TOOL, *flags)
    assert "553/553" in run_ok(TOOL, *flags).stderr  # nothing is converted twice, the bar begins there
    assert contents(tmp_path / "raw") == contents(straight[0])


# ------------------------------------------------------------------------------
# hostile input
# ------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def small(events, tmp_path_factory):
    """Ten events, numbers 0 to 9."""
    folder = tmp_path_factory.mktemp("small")
    write_database(folder / "a.db", [event | {"event_id": i} for i, event in enumerate(events[:10])])
    write_table(folder / "table.parquet")
    return folder


@pytest.mark.parametrize("sql, words", [
    ("DROP TABLE merged_photons", ["no table merged_photons, only mc_truth", "correct --pulsemap"]),
    ("DROP TABLE mc_truth", ["no table mc_truth, only merged_photons"]),
    ("ALTER TABLE merged_photons RENAME COLUMN t TO u", ["merged_photons has no column t or dom_time, only"]),
    ("ALTER TABLE mc_truth RENAME COLUMN initial_state_zenith TO u", ["mc_truth has no column initial_st"]),
    ("DROP INDEX event_no_merged_photons", ["merged_photons has no index on event_no", "CREATE INDEX"]),
    ("UPDATE merged_photons SET sensor_pos_x = sensor_pos_x + 30 WHERE event_no = 4",
     ["merged_photons: event 4", "where the geometry has no DOM (the nearest is ", "another detector"]),
    ("UPDATE merged_photons SET sensor_pos_z = NULL WHERE event_no = 4", ["event 4: sensor_pos_z is nan"]),
    ("UPDATE merged_photons SET t = NULL WHERE event_no = 4", ["event 4: t is nan"]),
    ("UPDATE merged_photons SET t = t + 2e6 * (rowid % 2) WHERE event_no = 4", ["event 4 has pulses more"]),
    ("UPDATE merged_photons SET charge = -1 WHERE event_no = 4", ["event 4: charge is -1.0, must lie in "]),
    ("UPDATE merged_photons SET charge = 0 WHERE event_no = 4", ["event 4 has no charge; leave it out"]),
    ("UPDATE merged_photons SET charge = 'much' WHERE event_no = 4", ["merged_photons cannot be read"]),
    ("UPDATE merged_photons SET charge = x'00ff' WHERE event_no = 4", ["merged_photons cannot be read"]),
    ("UPDATE merged_photons SET hlc = 2 WHERE event_no = 4", ["event 4: hlc is 2.0"]),
    ("UPDATE mc_truth SET initial_state_energy = NULL WHERE event_no = 4", ["initial_state_energy is nan"]),
    ("UPDATE mc_truth SET initial_state_zenith = 91 WHERE event_no = 4", ["initial_state_zenith is 91.0"]),
    ("DELETE FROM mc_truth WHERE event_no IN (4, 7)",
     ["2 events of table merged_photons have no row in table mc_truth, the first is event 4"]),
    ("DELETE FROM merged_photons", ["no event of table merged_photons has a pulse"]),
])
def test_hostile_databases_are_one_clear_line(small, tmp_path, sql, words):
    shutil.copy(small / "a.db", tmp_path / "a.db")
    with sqlite3.connect(tmp_path / "a.db") as database:
        database.execute(sql)
    flags = [f"--database={tmp_path}/a.db", f"--geometry={small}/table.parquet", "--selections={}",
             "--pulsemap=merged_photons", f"--out_dir={tmp_path}/raw"]
    line = user_error(TOOL, *flags)
    assert "a.db: " in line and all(text in line for text in words), line
    assert not (tmp_path / "raw/train_meta.parquet").exists()
    if "CREATE INDEX" in line:  # the command that it names helps
        program, *arguments = shlex.split(line.partition("make one, once: ")[2])
        assert program == "python"
        subprocess.run([sys.executable, *arguments], check=True)
        run_ok(TOOL, *flags)


def test_files_that_are_missing_damaged_or_of_another_kind(small, tmp_path):
    whole = (small / "a.db").read_bytes()
    flags = [f"--geometry={small}/table.parquet", "--selections={}", "--pulsemap=merged_photons",
             f"--out_dir={tmp_path}/raw", f"--database={tmp_path}/a.db"]
    assert "a.db: no such file" in user_error(TOOL, *flags)
    for content, words in ((b"", "not an SQLite database"), (b"PAR1" * 100, "not an SQLite database"),
                           (whole[:len(whole) // 2], "cut off, get it anew"),
                           (whole[:20_000] + bytes(20_000) + whole[40_000:], "cannot be read")):
        (tmp_path / "a.db").write_bytes(content)
        assert words in user_error(TOOL, *flags)
    (tmp_path / "a.db").write_bytes(whole)
    dom = {"dom_x": [1.0], "dom_y": [1.0], "dom_z": [1.0], "string": [1]}
    for name, table, words in (("a", {"x": [1.0]}, "needs the columns sensor_pos_x"),
                               ("b", {"dom_x": [1.0], "string": [1]}, "needs the columns sensor_pos_x"),
                               ("c", dom | {"dom_z": ["a"]}, "column dom_z is of type string"),
                               ("d", dom | {"dom_z": [np.nan]}, "row 0: a position is not finite"),
                               ("e", {name: 2 * value for name, value in dom.items()}, "equal places")):
        pq.write_table(pa.table(table), tmp_path / f"{name}.parquet")
        assert words in user_error(TOOL, *flags, f"--geometry={tmp_path}/{name}.parquet")
    assert "nothing.csv: no such file" in user_error(TOOL, *flags, "--geometry=nothing.csv")
    position = np.random.default_rng(0).uniform(-500, 500, (40_000, 3))
    write_table(tmp_path / "large.parquet", position, np.zeros(40_000))
    assert "32,767 at most" in user_error(TOOL, *flags, f"--geometry={tmp_path}/large.parquet")


def test_selections_that_make_no_sense(small, tmp_path):
    for name, numbers in (("a", [1, 2, 3]), ("b", [3, 4]), ("c", [8, 9, 10]), ("d", [1.5])):
        pq.write_table(pa.table({"event_no": numbers}), tmp_path / f"{name}.parquet")
    pq.write_table(pa.table({"event": [1]}), tmp_path / "e.parquet")
    (tmp_path / "f.csv").write_bytes(b"")
    flags = [f"--database={small}/a.db", f"--geometry={small}/table.parquet", f"--out_dir={tmp_path}/raw"]

    def refused(files, pulsemap="merged_photons"):
        selections = {split: f"{tmp_path}/{file}" for split, file in zip("xyz", files.split())}
        return user_error(TOOL, *flags, f"--selections={selections}", f"--pulsemap={pulsemap}")
    assert "1 events of selection 'y' have been selected before, the first is event 3" in refused(
        "a.parquet b.parquet")
    assert "1 events of selection 'x' have no row in table mc_truth, the first is event 10" in refused(
        "c.parquet")
    assert "no column event_no of integers" in refused("d.parquet")
    assert "only event; write it anew" in refused("e.parquet")
    assert "not a readable table" in refused("f.csv") and "no such file" in refused("g.csv")
    assert "2 tables for 1 selections" in refused("a.parquet", "merged_photons+pulses_no_noise")
    assert "write the split's name and a file" in user_error(TOOL, *flags, "--selections={'x': 3}")
    assert "2 tables for 1 selections" in user_error(TOOL, *flags, "--selections={}")
    assert "between 0 and 1" in user_error(TOOL, *flags, "--val_share=1")
