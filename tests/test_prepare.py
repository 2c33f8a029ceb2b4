"""prepare.py: the rule, workers, interruptions, hostile input. Files are real and small."""
import os
import shutil
import signal
import zlib

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import call, run, run_ok, start, user_error, wait_until

import data
import prepare
import utils

GEOMETRY = np.random.default_rng(0).uniform(-500, 500, (5160, 3))  # [m]
DETECTOR = GEOMETRY, np.arange(5160) // 60
N_EVENTS = {1: 130, 2: 120, 3: 33, 4: 40}  # batches; the third is small, as Kaggle's last one is
B, M, FIRST = "train/batch_2.parquet", "train_meta.parquet", N_EVENTS[1]  # FIRST: row of batch 2
COLUMNS = ("time", "charge", "sensor_id", "auxiliary")
SPLITS = "--splits={'pretrain': (1, 2), 'val': (3, 3), 'test': 'test'}"

@pytest.fixture(autouse=True)
def in_this_process(monkeypatch):
    """Write batches in this process, which is quicker. run() starts a script with workers."""
    monkeypatch.setattr(utils, "run_in_workers", lambda function, jobs, workers, done: [
        done(function(*job)) for job in jobs])

def make_events(rng, n, lengths=(1, 2, 60, 126, 127, 128, 129, 500)):
    """Make n events of all kinds -> list of dicts."""
    events = []
    for i in range(n):
        length = 5000 if i == 7 else int(rng.choice(lengths))
        t = 6000 + rng.integers(0, 9000 if i % 5 else length // 3 + 1, length)  # some have ties
        events.append({
            "event_id": int(rng.integers(2**40)), "time": t if i % 7 == 0 else np.sort(t),
            "charge": np.round(rng.integers(1, 80, length) * 0.025, 3),
            "sensor_id": rng.integers(0, 5160 if i % 3 else 40, length).astype(np.int16),
            "auxiliary": rng.random(length) < (0, 1, 0.7, 0.97)[i % 4],
            "azimuth": rng.uniform(0, 2 * np.pi), "zenith": np.arccos(rng.uniform(-1, 1)),
            "energy": 10 ** rng.uniform(2, 6), "event_class": 1 + i % 2})
    return events

def pulse_table(events):
    table = {name: np.concatenate([event[name] for event in events]) for name in COLUMNS}
    n = [len(event["time"]) for event in events]
    return pa.table(table | {"event_id": np.repeat([event["event_id"] for event in events], n)})

def write_kaggle(folder, train, test=None, **options):
    for kind, batches in (("train", train), ("test", test or {})):
        names = ["event_id", *["azimuth", "zenith", "energy", "event_class"] * (kind == "train")]
        rows = []
        (folder / kind).mkdir(parents=True)
        for number, events in batches.items():
            path, end = folder / f"{kind}/batch_{number}.parquet", 0
            pq.write_table(pulse_table(events), path, **options)
            for event in events:
                first, end = end, end + len(event["time"])
                rows.append({name: event[name] for name in names} | {
                    "batch_id": number, "first_pulse_index": first, "last_pulse_index": end - 1})
        pq.write_table(pa.Table.from_pylist(rows), folder / f"{kind}_meta.parquet")
    write_geometry(folder, GEOMETRY)
    return folder

def write_geometry(folder, geometry):
    lines = [f"{dom},{x},{y},{z}" for dom, (x, y, z) in enumerate(geometry.tolist())]
    (folder / "sensor_geometry.csv").write_text("\n".join(["sensor_id,x,y,z", *lines]) + "\n")

def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}

@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    rng, folder = np.random.default_rng(1), tmp_path_factory.mktemp("raw")
    train = {number: make_events(rng, n) for number, n in N_EVENTS.items()}
    test = {5: make_events(rng, 30), 6: make_events(rng, 20)}
    return write_kaggle(folder, train, test, row_group_size=1000), train

@pytest.fixture(scope="module")
def straight(raw, tmp_path_factory):
    folder = tmp_path_factory.mktemp("straight")
    return folder, run_ok("prepare.py", f"--input_dir={raw[0]}", f"--data_dir={folder}", SPLITS,
                          "--workers=1", how=run)

# ---- the rule and the format --------------------------------------------------------------------

def reference(events, max_pulses, seed, keep_rule):
    """Apply the rule to one event after another -> EVENT records, PULSE records."""
    records, kept, start = np.zeros(len(events), data.EVENT), [], 0
    for record, event in zip(records, events):
        order = np.argsort(event["time"], kind="stable")
        t, q, dom, aux = (event[name][order] for name in COLUMNS)
        draw = data.uniform_hash(seed, np.array([event["event_id"]]), np.arange(len(t)), len(t))
        hlc, other = np.flatnonzero(~aux), np.flatnonzero(aux)
        if len(t) <= max_pulses:
            keep = np.arange(len(t))
        elif keep_rule == "brightest":
            keep, q = brightest(q, dom, hlc, other, draw, max_pulses)
        elif len(hlc) >= max_pulses:
            keep = np.sort(hlc[np.argsort(draw[hlc])[:max_pulses]])
        else:
            keep = np.sort(np.append(hlc, other[np.argsort(draw[other])[:max_pulses - len(hlc)]]))
        pulses = np.zeros(len(keep), data.PULSE)
        for name, column in (("time", t), ("charge", q), ("dom", dom), ("aux", aux)):
            pulses[name] = column[keep]
        kept.append(pulses)
        for name in ("event_id", "azimuth", "zenith", "energy", "event_class"):
            record[name] = event[name]
        record["start"], record["length"], record["n_pulses"] = start, len(keep), len(t)
        q = event["charge"][order]
        record["total_charge"] = q.sum()
        record["center"] = (q[:, None] * GEOMETRY[dom]).sum(axis=0) / q.sum()
        record["line_fit"] = fitted_line(t[hlc], q[hlc], dom[hlc])
        start += len(keep)
    return records, np.concatenate(kept)

def brightest(q, dom, hlc, other, draw, max_pulses):
    """Choose the pulses of a too long event -> indices in order of time, new charges."""
    of_dom = {}  # HLC pulses of each DOM, which are in order of time
    for i in hlc:
        of_dom.setdefault(dom[i], []).append(i)
    ranked = sorted(of_dom.values(), key=lambda pulses: 1e-3 * draw[pulses[0]] - sum(q[pulses]))
    firsts = [pulses[0] for pulses in ranked]
    rest = sorted(set(hlc) - set(firsts), key=lambda i: draw[i])
    rest += sorted(other, key=lambda i: draw[i])
    keep, charge = sorted((firsts + rest)[:max_pulses]), q.copy()
    for pulses in of_dom.values():
        last = None
        for i in pulses:
            if i in keep:
                last = i
            elif last is not None:
                charge[last] += q[i]
    return np.array(keep), charge

def fitted_line(t, q, dom):
    """Fit position = r + v t to HLC pulses, by a general solver -> unit vector against v."""
    of_dom, of_string = {}, {}  # the first pulse
    for i in range(len(t)):
        of_dom.setdefault(dom[i], i)
        of_string.setdefault(dom[i] // 60, i)
    apart = lambda i, j: np.abs(GEOMETRY[dom[i], 2] - GEOMETRY[dom[j], 2])
    use = [i for i in of_dom.values() for j in [of_string[dom[i] // 60]]
           if t[i] - t[j] <= apart(i, j) / 0.22 + 200]
    use = [i for i in use if q[dom == dom[i]].any()]
    charge = weight = np.array([q[dom == dom[i]].sum() for i in use])
    if len(np.unique(t[use])) < 2 or len(use) < 2:
        return np.zeros(3)
    matrix, position = np.stack([np.ones(len(use)), (t[use] - 1e4) / 1e3], 1), GEOMETRY[dom[use]]
    for _ in range(2):
        root = np.sqrt(weight)[:, None]
        line = np.linalg.lstsq(matrix * root, position * root, rcond=None)[0]
        weight = charge / (1 + ((position - matrix @ line) ** 2).sum(1) / 153 ** 2)
    return -line[1] / np.linalg.norm(line[1])

def assert_equal_records(found, expected):
    """Equal to the last bit, except sums, in which the order of their terms shows."""
    tolerance = {"total_charge": (3e-7, 1e-4), "center": (3e-7, 1e-4), "line_fit": (0, 1e-3)}
    for name in expected.dtype.names:
        np.testing.assert_allclose(found[name], expected[name], *tolerance.get(name, (0, 0)))

@pytest.mark.parametrize("max_pulses, seed, keep", [
    (127, 0, "random"), (3, 5, "random"), (127, 0, "brightest"), (20, 5, "brightest")])
def test_the_rule_event_by_event(raw, tmp_path, max_pulses, seed, keep):
    run_ok("prepare.py", f"--input_dir={raw[0]}", f"--data_dir={tmp_path}/data", SPLITS,
           f"--max_pulses={max_pulses}", f"--seed={seed}", f"--keep={keep}")
    for name, batches in (("pretrain", (1, 2)), ("val", (3,))):
        events = [event for number in batches for event in raw[1][number]]
        events, pulses = reference(events, max_pulses, seed, keep)
        split = data.open_split(tmp_path / "data", name)
        assert_equal_records(split.events, events)
        assert_equal_records(split.pulses, pulses)
    geometry = np.fromfile(tmp_path / "data/geometry.bin", data.GEOMETRY)
    assert np.array_equal(geometry["position"], GEOMETRY.astype(np.float32))

def test_no_line_fit_where_no_line_can_be_fitted():
    """No HLC pulse; one; two at one time; two in one DOM; two to fit; charges of zero."""
    events = np.zeros(6, data.EVENT)
    events["n_pulses"] = [2, 2, 2, 3, 3, 2]
    hlc = np.array([0, 0, 1, 0, 1, 1, 1, 1, 0, 1, 0, 1, 1, 1], bool)
    t = np.array([7, 9, 7, 9, 8, 8, 7, 9, 9, 7, 8, 9, 7, 9]) * 1000 + 333
    dom = np.array([1, 2, 1, 2, 1, 2, 5, 5, 6, 3, 9, 4, 1, 2])
    charge = np.where(np.arange(14) < 12, 1.7, 0.0)
    position = np.array([[0, 0, 0 if dom == 4 else -17] for dom in range(10)])
    prepare.pack(events, t, charge, dom, ~hlc, (position, np.arange(10)), prepare.PrepareConfig())
    assert events["line_fit"].tolist() == [[0, 0, 0]] * 4 + [[0, 0, -1], [0, 0, 0]]

@pytest.mark.parametrize("header, rows, expected", [
    ("sensor_id,x,y,z,string", ["2,5,1,-30,7", "0,9,1,10,3", "1,5,1,20,7"], [0, 1, 1]),
    ("sensor_id,x,y,z", ["2,5,1,-30", "0,9,1,10", "1,5,1,20", "3,5,2,0"], [2, 0, 0, 1]),  # by x, y
    ("sensor_id,x,y,z", [f"{i},{i * 0.01},0,0" for i in range(5160)], np.arange(5160) // 60)])
def test_strings_of_a_detector(tmp_path, header, rows, expected):
    """A column string; else equal x, y; IceCube's 5160 by their ids, whose x, y are not quite."""
    (tmp_path / "g.csv").write_text("\n".join([header, *rows]))
    position, string = data.read_geometry_csv(tmp_path / "g.csv")
    assert np.array_equal(string, expected) and position.shape == (len(rows), 3)
    (tmp_path / "g.csv").write_text("sensor_id,x,y,z,string\n1,5,1,2,7\n0,9,1,1,\n")
    with pytest.raises(SystemExit):  # a gap
        data.read_geometry_csv(tmp_path / "g.csv")

def test_the_draw_is_fair_and_depends_on_the_event_alone():
    n, config = 2000, prepare.PrepareConfig(max_pulses=20)
    events = np.zeros(n, data.EVENT)
    events["event_id"], events["n_pulses"] = np.arange(n), 50
    t, charge, dom = np.tile(np.arange(50), n), np.ones(50 * n), np.zeros(50 * n, int)
    aux = np.tile(np.arange(50) >= 10, n)  # ten HLC pulses stay, ten of forty others
    pulses = prepare.pack(events, t, charge, dom, aux, DETECTOR, config)
    share = np.bincount(pulses["time"].astype(int), minlength=50) / n
    assert (share[:10] == 1).all() and np.abs(share[10:] - 0.25).max() < 0.05  # 5 sigma
    again = prepare.pack(events[100:101], t[:50], charge[:50], dom[:50], aux[:50], DETECTOR, config)
    assert np.array_equal(again, pulses[2000:2020])

def test_the_test_set_has_no_labels(straight):
    events = data.open_split(straight[0], "test").events
    assert len(events) == 50 and not events["event_class"].any()
    assert all(np.isnan(events[name]).all() for name in ("azimuth", "zenith", "energy"))

def test_the_table_and_meta_json(straight):
    folder, done = straight
    split, meta = data.open_split(folder, "val"), data.read_folder(folder)[0]
    e, n_cut = split.events, (split.events["n_pulses"] > 127).sum()
    counts = f"val: 1 batches, n_events 33, n_pulses {len(split.pulses)}, n_cut {n_cut},"
    x, y, z = np.sin(e["zenith"]), np.sin(e["zenith"]), np.cos(e["zenith"])
    source = np.stack([x * np.cos(e["azimuth"]), y * np.sin(e["azimuth"]), z], axis=1)
    cosine = f"{(e['line_fit'] * source).sum(axis=1).mean():.3f}"
    assert counts in done.stdout and f"cosine of line fit and label {cosine}" in done.stdout
    crc = [zlib.crc32(array.tobytes()) for array in (split.events, split.pulses)]
    row = [3, 33, len(split.pulses), n_cut, split.pulses["aux"].sum(), *crc]
    assert meta["splits"]["val"]["batches"] == [row]

# ---- workers, interruptions, settings -----------------------------------------------------------

def test_the_bytes_do_not_depend_on_the_workers(raw, straight, tmp_path):
    run_ok("prepare.py", f"--input_dir={raw[0]}", f"--data_dir={tmp_path}/data", SPLITS,
           "--workers=3", how=run)
    assert contents(tmp_path / "data") == contents(straight[0])

@pytest.mark.parametrize("stop, status", [(signal.SIGKILL, -9), (signal.SIGINT, 130)])
def test_stopped_and_resumed_is_as_never_stopped(tmp_path, stop, status):
    events = make_events(np.random.default_rng(4), 150)
    batches = {number: [event | {"event_id": event["event_id"] * 41 + number} for event in events]
               for number in range(1, 41)}
    source, target = write_kaggle(tmp_path / "raw", batches), tmp_path / "data"
    flags = [f"--input_dir={source}", "--splits={'all': (1, 40)}", "--workers=2"]
    process = start("prepare.py", *flags, f"--data_dir={target}")
    wait_until(lambda: list(target.glob("unfinished/all_*.json")), process)
    os.kill(process.pid if stop == signal.SIGKILL else -process.pid, stop)  # -: the whole group
    output = process.communicate(timeout=20)[0]  # its workers hold the pipe: they end as well
    assert process.returncode == status and (status < 0 or "resumes" in output), output
    assert len(list(target.glob("unfinished/all_*.json"))) < 40
    assert "seed" in user_error("prepare.py", *flags, f"--data_dir={target}", "--seed=1")
    run_ok("prepare.py", *flags, f"--data_dir={target}")
    run_ok("prepare.py", *flags, f"--data_dir={tmp_path}/straight")
    assert contents(target) == contents(tmp_path / "straight")

def test_a_batch_is_done_again_if_its_input_has_changed(raw, straight, tmp_path):
    source = shutil.copytree(raw[0], tmp_path / "raw")
    flags = [f"--input_dir={source}", f"--data_dir={tmp_path}/data", SPLITS]
    first, second, third = (source / f"train/batch_{number}.parquet" for number in (1, 2, 3))
    spoil(second, "charge", 30, 1e3)
    for geometry in (GEOMETRY + [0, 0, 50], GEOMETRY):  # other centers: starts over
        write_geometry(source, geometry)
        third.write_bytes(b"broken")
        assert "batch_3" in user_error("prepare.py", *flags)
        shutil.copy(raw[0] / "train/batch_3.parquet", third)
    shutil.copy(raw[0] / "train/batch_2.parquet", second)  # done again
    changed = first.stat().st_mtime_ns
    first.write_bytes(bytes(first.stat().st_size))  # finished, so it is not read
    os.utime(first, ns=(changed, changed))
    run_ok("prepare.py", *flags)
    found, expected = contents(tmp_path / "data"), contents(straight[0])
    assert all(found[name] == expected[name] for name in expected if name != "meta.json")

@pytest.mark.parametrize("option, words", [
    ("--seed=4", "seed = 0, now 4"), ("--max_pulses=64", "'max_pulses': 127"),
    ("--keep=brightest", "'keep': 'random'"), ("--splits={'val': (3, 3)}", "split"),
    ("--input_dir=data", "input_dir = ")])
def test_a_complete_folder_is_left_alone(raw, straight, tmp_path, option, words):
    target = shutil.copytree(straight[0], tmp_path / "data")
    flags = [f"--input_dir={raw[0]}", f"--data_dir={target}", SPLITS]
    assert "complete, nothing to do" in run_ok("prepare.py", *flags).stdout
    assert words in user_error("prepare.py", *flags, option)
    assert contents(target) == contents(straight[0])
    os.truncate(target / "val_pulses.bin", 100)
    assert "val_pulses.bin" in user_error("prepare.py", *flags)
    os.utime(target / "meta.json", (0, 0))
    assert f"{raw[0]}, before it changed, now" in user_error("prepare.py", *flags)

# ---- hostile input: each case spoils a good folder in one way -----------------------------------

def spoil(path, column, row, value):
    """Set one value of a parquet file; without a column, cut it to `row` bytes."""
    if not column:
        return os.truncate(path, row) if row else path.unlink()
    table = pq.read_table(path)
    values = table[column].to_pylist()
    values[row] = value
    values = np.array(values, np.float16) if isinstance(value, np.float16) else values
    index = table.column_names.index(column)
    pq.write_table(table.set_column(index, column, pa.array(values)), path)

@pytest.mark.parametrize("file, column, row, value, words", [
    (B, "", 5000, 0, f"{B}: file cannot be read"), (M, "", 3000, 0, f"{M}: file cannot be read"),
    (B, "sensor_id", 3, 0.5, f"{B}: sensor_id cannot be read after row 0: Cannot cast"),
    (B, "sensor_id", 1234, 5160, "sensor_id 5160 is not 0 to 5159"),
    (B, "charge", 2001, np.float16("inf"), "charge inf is not 0 to 1"), (B, "", 0, 0, "no file"),
    (B, "time", 4, -7, "time -7.0 is not 0"), (B, "time", 4, 2**25, "time 33554432.0 is not 0 to"),
    (B, "charge", 4, 1e30, "1e+30 is not 0 to"), (B, "auxiliary", 4, None, "auxiliary cannot be"),
    (B, "event_id", 300, 777, "event_id is not the meta table's"),
    (M, "last_pulse_index", FIRST - 1, 2**20, "has not the 1048577 rows"),
    (M, "first_pulse_index", FIRST + 5, 3, f"{M}: row {FIRST + 5}: pulses must follow"),
    (M, "zenith", FIRST + 1, 91.0, "zenith must be in radians"), (M, "", 0, 0, "No such file"),
    (M, "azimuth", FIRST + 1, np.inf, f"row {FIRST + 1}: azimuth must be in radians"),
    (M, "energy", FIRST + 2, 0.0, "above 0 GeV"), (M, "event_class", FIRST + 2, 258, "0, 1 or 2"),
    (M, "energy", FIRST + 2, 1e40, "above 0 GeV"),
    (M, "batch_id", FIRST + 8, 1, f"row {FIRST + 8}: sort the table by batch_id"),
    ("", "", 0, "{'a': (1, 3), 'b': (3, 3)}", "each batch once"),
    ("", "", 0, "{'a': (3, 1)}", "(first, last)"), ("", "", 0, "{'a': 'tset'}", "(first, last)"),
    ("", "", 0, "{'a': (2, 6)}", "2 batches, for example ")])
def test_hostile_input_is_one_clear_line(raw, tmp_path, file, column, row, value, words):
    source = shutil.copytree(raw[0], tmp_path / "raw")
    splits = SPLITS if file else f"--splits={value}"
    if file:
        spoil(source / file, column, row, value)
    flags = [f"--input_dir={source}", f"--data_dir={tmp_path}/data", splits, "--workers=1"]
    assert words in user_error("prepare.py", *flags, how=run if column == "time" else call)
    assert not (tmp_path / "data/meta.json").exists()

@pytest.mark.parametrize("z, time, aux, words, option", [
    (-1948, 0, False, ", -19", "--origin=0,0,-1948"),
    (0, 90_000, False, "pulses are around 100", "--shift_times=True"),
    (0, 10**9, False, "not 0 to 16777216", "--shift_times=True"),
    (0, 0, True, "; 0 HLC pulses are around 0 ns", "")])
def test_wrong_origins_and_no_hlc_pulse_are_refused(demo_data, tmp_path, z, time, aux, words,
                                                    option):
    source = shutil.copytree(demo_data.parent / "raw", tmp_path / "raw")
    position, string = data.read_geometry_csv(source / "sensor_geometry.csv")
    write_geometry(source, position + [0, 0, z])
    table = pq.read_table(source / "train/batch_1.parquet").to_pydict()
    columns = {name: np.array(values) for name, values in table.items()}
    columns |= {"time": columns["time"] + time, "auxiliary": columns["auxiliary"] | aux}
    pq.write_table(pa.table(columns), source / "train/batch_1.parquet")
    flags = [f"--input_dir={source}", "--splits={'a': (1, 1)}"]
    assert words in user_error("prepare.py", *flags, f"--data_dir={tmp_path}/d")
    if option:
        run_ok("prepare.py", *flags, f"--data_dir={tmp_path}/e", option)
        assert ("shifted" in str(data.read_folder(tmp_path / "e"))) == ("shift" in option)
        split, before = data.open_split(tmp_path / "e", "a"), data.open_split(demo_data, "pretrain")
        for event in split.events:
            pulses, old = (x.pulses[event["start"]:][:event["length"]] for x in (split, before))
            apart = pulses["time"] - old["time"]
            hlc = pulses["time"][~pulses["aux"]]
            assert np.ptp(apart) == 0 and np.array_equal(pulses["dom"], old["dom"])
            if time and event["n_pulses"] == event["length"] and len(hlc):
                assert hlc[0] == 10_000 or pulses["time"][0] == 0
        assert np.allclose(split.events["center"], before.events["center"][:150], atol=1e-3)

def test_unknown_truth_missing_batches_and_checksums(raw, tmp_path):
    source, target = shutil.copytree(raw[0], tmp_path / "raw"), tmp_path / "data"
    for row, column in enumerate(("azimuth", "zenith", "energy")):
        spoil(source / M, column, row, None)
    event_id = pq.read_table(source / M)["event_id"].to_pylist()
    flags = [f"--input_dir={source}", f"--data_dir={target}", "--verify=True",
             "--splits={'pretrain': [(1, 2), (4, 9)], 'val': [(3, 3)]}"]
    (source / B).unlink()
    assert "6 batches, for example 2, have no file" in user_error("prepare.py", *flags)
    spoil(source / M, "event_id", -1, event_id[3])
    flags.append("--skip_missing=True")
    assert f"event_id {event_id[3]} is there twice" in user_error("prepare.py", *flags)
    spoil(source / M, "event_id", -1, event_id[-1])
    run_ok("prepare.py", *flags)
    events = data.open_split(target, "pretrain").events
    assert len(events) == N_EVENTS[1] + N_EVENTS[4]
    assert [np.isnan(events[name]).nonzero()[0].tolist()
            for name in ("azimuth", "zenith", "energy")] == [[0], [1], [2]]
    content = bytearray((target / "val_events.bin").read_bytes())
    content[-5] ^= 1  # the last energy
    (target / "val_events.bin").write_bytes(content)
    assert "val_*.bin: not as in meta.json" in user_error("prepare.py", *flags)
