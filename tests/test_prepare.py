"""prepare.py as users run it: the rule, workers, interruptions, hostile input. Files are real and small."""
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import data
import prepare
import simulate
import tables
from conftest import ROOT, hear_ctrl_c, run_ok, user_error

GEOMETRY = simulate.build_geometry()  # (5160, 3)
N_EVENTS = {1: 130, 2: 120, 3: 33, 4: 40}  # batches; the third is small, as Kaggle's last one is


def make_events(rng, n, lengths=(1, 2, 60, 126, 127, 128, 129, 500)):
    """n events of all kinds, as a list of dicts."""
    events = []
    for i in range(n):
        length = 5000 if i == 7 else int(rng.choice(lengths))
        aux_share = (0, 1, 0.7, 0.97)[i % 4]
        # every fifth is full of ties
        times = rng.integers(6000, 6000 + (length // 3 + 1 if i % 5 == 0 else 9000), length)
        events.append({"event_id": int(rng.integers(2**40)), "time": times if i % 7 == 0 else np.sort(times),
                       "charge": np.round(rng.integers(1, 80, length) * 0.025, 3),
                       "sensor_id": rng.integers(0, 5160 if i % 3 else 40, length),
                       "auxiliary": rng.random(length) < aux_share, "azimuth": rng.uniform(0, 2 * np.pi),
                       "zenith": np.arccos(rng.uniform(-1, 1)), "energy": 10 ** rng.uniform(2, 6),
                       "event_class": 1 + i % 2})
    return events


def pulse_table(events, event_id=True):
    columns = {"sensor_id": np.int16, "time": np.int64, "charge": np.float64, "auxiliary": bool}
    table = {name: np.concatenate([event[name] for event in events]).astype(kind)
             for name, kind in columns.items()}
    if event_id:
        table["event_id"] = np.repeat([event["event_id"] for event in events],
                                      [len(event["time"]) for event in events])
    return pa.table(table)


def meta_table(batches, labels=("azimuth", "zenith")):
    rows = {name: [] for name in ("batch_id", "event_id", "first_pulse_index", "last_pulse_index", *labels)}
    for number, events in batches.items():
        end = np.cumsum([len(event["time"]) for event in events])
        rows["batch_id"] += [number] * len(events)
        rows["first_pulse_index"] += [0, *end[:-1]]
        rows["last_pulse_index"] += list(end - 1)
        for name in ("event_id", *labels):
            rows[name] += [event[name] for event in events]
    return pa.table(rows)


def write_geometry(folder, geometry=GEOMETRY):
    lines = ["sensor_id,x,y,z"] + [f"{dom},{x},{y},{z}" for dom, (x, y, z) in enumerate(geometry.tolist())]
    (folder / "sensor_geometry.csv").write_text("\n".join(lines) + "\n")


def write_kaggle(folder, train, test=None, row_group_size=1000):
    for kind, batches in (("train", train), ("test", test or {})):
        (folder / kind).mkdir(parents=True)
        for number, events in batches.items():
            pq.write_table(pulse_table(events), folder / kind / f"batch_{number}.parquet",
                           row_group_size=row_group_size)
    pq.write_table(meta_table(train, ("azimuth", "zenith", "energy", "event_class")),
                   folder / "train_meta.parquet")
    if test:
        pq.write_table(meta_table(test, ()), folder / "test_meta.parquet", row_group_size=50)
    write_geometry(folder)
    return folder


def reference(events, max_pulses=127, seed=0, rule="paper"):
    """The rule, one event after another -> (EVENT records, PULSE records)."""
    records, kept, start = np.zeros(len(events), data.EVENT), [], 0
    for record, event in zip(records, events):
        order = np.argsort(event["time"], kind="stable")
        t, q, dom, aux = (event[name][order] for name in ("time", "charge", "sensor_id", "auxiliary"))
        draw = data.uniform_hash(seed, event["event_id"], np.arange(len(t)))
        good, bad = np.flatnonzero(~aux), np.flatnonzero(aux)
        if len(t) <= max_pulses:
            keep = np.arange(len(t))
        elif rule == "brightest":
            keep, q = brightest(t, q, dom, good, bad, draw, max_pulses)
        elif len(good) >= max_pulses:
            keep = np.sort(good[np.argsort(draw[good])[:max_pulses]])
        else:
            keep = np.sort(np.append(good, bad[np.argsort(draw[bad])[:max_pulses - len(good)]]))
        pulses = np.zeros(len(keep), data.PULSE)
        for name, column in (("time", t), ("charge", q), ("dom", dom), ("aux", aux)):
            pulses[name] = column[keep]
        kept.append(pulses)
        for name in ("event_id", "azimuth", "zenith", "energy", "event_class"):
            record[name] = event[name]
        record["start"], record["length"], record["n_pulses"] = start, len(keep), len(t)
        q = event["charge"][order]
        record["total_charge"], record["center"] = q.sum(), (q[:, None] * GEOMETRY[dom]).sum(axis=0) / q.sum()
        record["motion"] = fitted_motion(t[good], q[good], dom[good])
        start += len(keep)
    return records, np.concatenate(kept)


def brightest(t, q, dom, good, bad, draw, max_pulses):
    """What keep = "brightest" keeps of an event that is too long -> indices in order of time, new charges."""
    of_dom = {}  # good pulses of each DOM, which are in order of time
    for i in good:
        of_dom.setdefault(dom[i], []).append(i)
    ranked = sorted(of_dom.values(), key=lambda pulses: 1e-3 * draw[pulses[0]] - sum(q[pulses]))
    firsts = [pulses[0] for pulses in ranked]
    others = [*sorted(set(good) - set(firsts), key=lambda i: draw[i]), *sorted(bad, key=lambda i: draw[i])]
    keep, charge = sorted((firsts + others)[:max_pulses]), q.copy()
    for pulses in of_dom.values():
        last = None
        for i in pulses:
            if i in keep:
                last = i
            elif last is not None:
                charge[last] += q[i]
    return np.array(keep), charge


def fitted_motion(t, q, dom):
    """Against the velocity of a weighted least-squares fit of position = r + v t, by a general solver."""
    if len(np.unique(t)) < 2 or len(np.unique(dom)) < 2:
        return np.zeros(3)
    matrix = np.stack([np.ones(len(t)), (t - 1e4) / 1e3], axis=1) * np.sqrt(q)[:, None]
    v = np.linalg.lstsq(matrix, GEOMETRY[dom] * np.sqrt(q)[:, None], rcond=None)[0][1]
    return -v / np.linalg.norm(v)


def assert_equal_records(found, expected):
    """Equal to the last bit, but for sums, in which the order of their terms shows."""
    for name in expected.dtype.names:
        if name in ("total_charge", "center"):
            np.testing.assert_allclose(found[name], expected[name], rtol=3e-7, atol=1e-4, err_msg=name)
        elif name == "motion":
            np.testing.assert_allclose(found[name], expected[name], atol=1e-5, err_msg=name)
        else:
            np.testing.assert_array_equal(found[name], expected[name], err_msg=name)


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    rng = np.random.default_rng(1)
    train = {number: make_events(rng, n) for number, n in N_EVENTS.items()}
    folder = write_kaggle(tmp_path_factory.mktemp("raw") / "kaggle", train,
                          {5: make_events(rng, 30), 6: make_events(rng, 20)})
    return folder, train


SPLITS = "--splits={'pretrain': (1, 2), 'val': (3, 3), 'test': 'test'}"


@pytest.fixture(scope="module")
def straight(raw, tmp_path_factory):
    """A run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("straight") / "data"
    done = run_ok("prepare.py", f"--input_dir={raw[0]}", f"--data_dir={folder}", "--workers=1", SPLITS)
    return folder, done


# ------------------------------------------------------------------------------------------------------------
# the rule and the format
# ------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("max_pulses, seed, rule", [(127, 0, "paper"), (3, 5, "paper"),
                                                    (127, 0, "brightest"), (20, 5, "brightest")])
def test_the_rule_event_by_event(raw, straight, tmp_path, max_pulses, seed, rule):
    folder = straight[0]
    if (max_pulses, rule) != (127, "paper"):
        folder = tmp_path / "data"
        run_ok("prepare.py", f"--input_dir={raw[0]}", f"--data_dir={folder}", SPLITS,
               f"--max_pulses={max_pulses}", f"--seed={seed}", f"--keep={rule}", "--workers=2")
    for name, batches in (("pretrain", (1, 2)), ("val", (3,))):
        events, pulses = reference([event for number in batches for event in raw[1][number]], max_pulses,
                                   seed, rule)
        split = data.open_split(folder, name)
        assert_equal_records(split.events, events)
        assert_equal_records(split.pulses, pulses)
    geometry = data.read_geometry(folder)
    np.testing.assert_allclose(geometry["position"], GEOMETRY, rtol=1e-6)
    assert np.array_equal(geometry["string"], np.arange(5160) // 60)


def test_no_motion_where_no_line_can_be_fitted():
    """No good pulse; one; two at one time; two in one DOM; two that can be fitted; charges of zero."""
    detector = simulate.choose_detector("")
    events = np.zeros(6, data.EVENT)
    events["n_pulses"] = [2, 2, 2, 3, 3, 2]
    good = np.array([0, 0, 1, 0, 1, 1, 1, 1, 0, 1, 0, 1, 1, 1], bool)
    time = np.array([7, 9, 7, 9, 8, 8, 7, 9, 9, 7, 8, 9, 7, 9]) * 1000 + 333
    dom = np.array([1, 2, 1, 2, 1, 2, 5, 5, 6, 64, 9, 63, 1, 2])
    charge = np.where(np.arange(14) < 12, 1.7, 0.0)
    prepare.pack(events, time, charge, dom, ~good, detector, prepare.PrepareConfig())
    np.testing.assert_allclose(events["motion"], [[0, 0, 0]] * 4 + [[0, 0, -1], [0, 0, 0]], atol=1e-6)


def test_strings_of_a_detector(tmp_path):
    """A column string; without it equal x, y; IceCube's 5160 by their ids, x, y are not quite equal there."""
    def read(rows, header="sensor_id,x,y,z"):
        (tmp_path / "g.csv").write_text("\n".join([header, *rows]) + "\n")
        return tables.read_detector(tmp_path / "g.csv")
    rows = ["2,5.0,1.0,-30", "0,9.0,1.0,10", "1,5.0,1.0,20", "3,9.0,2.0,1"]
    assert len(set(read(rows).string[[0, 1, 3]])) == 3 and read(rows).string[1] == read(rows).string[2]
    named = read([f"{row},{n}" for row, n in zip(rows, [7, 3, 7, 3])], "sensor_id,x,y,z,string")
    assert named.string.tolist() == [3, 7, 7, 3] and named.position[2].tolist() == [10, 20, -30, 1]
    icecube = read([f"{dom},{dom * 0.01},0,{-dom}" for dom in range(5160)])
    assert icecube.string.tolist() == [dom // 60 for dom in range(5160)]


def test_neighbours_are_found_by_depth_on_strings_of_any_length():
    """DOM ids in no order: string 5 has DOMs 4, 0, 2, 3 from above, string 1 has DOM 1 alone."""
    z = np.array([30.0, 5, 20, 10, 90])
    detector = tables.Detector(np.stack([0 * z, 0 * z, z]), np.array([5, 1, 5, 5, 5]))
    rung = simulate.number_along_strings(detector)
    for a in range(5):
        for b in range(5):
            found = simulate.local_coincidence(np.zeros(2, int), rung[[a, b]], np.zeros(2))
            order = [4, 0, 2, 3]
            apart = abs(order.index(a) - order.index(b)) if 1 not in (a, b) else 0
            assert found.all() == found.any() == (apart in (1, 2)), (a, b)


def test_the_draw_is_fair_and_depends_on_the_event_alone():
    n, config = 2000, prepare.PrepareConfig(max_pulses=20)
    events = np.zeros(n, data.EVENT)
    events["event_id"], events["n_pulses"] = np.arange(n), 50
    time, charge, dom = np.tile(np.arange(50), n), np.ones(50 * n), np.zeros(50 * n, np.int16)
    aux = np.tile(np.arange(50) >= 10, n)  # ten good ones stay, ten of forty others
    detector = simulate.choose_detector("")
    pulses = prepare.pack(events, time, charge, dom, aux, detector, config)
    times = np.bincount(pulses["time"].astype(int), minlength=50)
    assert (times[:10] == n).all() and np.abs(times[10:] / n - 0.25).max() < 0.05  # 5 standard deviations
    again = prepare.pack(events[100:101], time[:50], charge[:50], dom[:50], aux[:50], detector, config)
    assert np.array_equal(again, pulses[2000:2020])


def test_the_test_set_has_no_labels(straight):
    split = data.open_split(straight[0], "test")
    assert len(split) == 50 and np.isnan(split.events["azimuth"]).all()
    assert np.isnan(split.events["energy"]).all()
    assert not split.events["event_class"].any()


def test_what_the_user_sees(straight):
    folder, done = straight
    split = data.open_split(folder, "pretrain")
    line = next(line for line in done.stdout.splitlines() if line.startswith("pretrain "))
    for text in ("250", f"{len(split.pulses):,}", f"{np.median(split.events['n_pulses']):.0f}",
                 f"{np.mean(split.events['n_pulses'] > 127):.1%}", f"{split.pulses['aux'].mean():.1%}",
                 f"{split.pulses['time'].min():.6g} to {split.pulses['time'].max():.6g}"):
        assert text in line, (text, line)
    assert "333/333" in done.stderr and "event/s" in done.stderr  # one bar over all events
    assert set(contents(folder)) == {"geometry.bin", "meta.json"} | {
        f"{name}_{kind}.bin" for name in ("pretrain", "val", "test") for kind in ("events", "pulses")}
    meta = json.loads((folder / "meta.json").read_text())
    assert meta["splits"]["val"]["batches"] == [3, 3] and meta["splits"]["test"]["n_events"] == 50
    assert (meta["source"], meta["seed"], meta["max_pulses"], meta["n_doms"]) == ("kaggle", 0, 127, 5160)


def test_every_way_of_writing_the_parquet_files_gives_the_same(tmp_path):
    rng = np.random.default_rng(2)
    events = make_events(rng, 60)
    for event in events:
        event["charge"] = np.round(event["charge"] * 4 + 1) / 4  # exact in float32
    plain = pulse_table(events)

    def cast(**kinds):
        return plain.cast(pa.schema([(field.name, kinds.get(field.name, field.type))
                                     for field in plain.schema]))
    pandas = json.dumps({"index_columns": ["event_id"], "columns": [], "column_indexes": []}).encode()
    first = len(events[0]["time"])  # pulses of no event at both ends and between
    gaps = [plain.slice(0, 2), plain.slice(0, first), plain.slice(5, 4), plain.slice(first),
            plain.slice(0, 1)]
    files = [(plain, {}), (plain.replace_schema_metadata({"pandas": pandas}),
                           {"compression": "zstd", "row_group_size": 77}),
             (cast(sensor_id=pa.uint16(), time=pa.int32(), charge=pa.float32(), event_id=pa.uint64()),
              {"compression": "none"}),
             (cast(sensor_id=pa.int64(), time=pa.float64()).select(["event_id", "auxiliary", "charge", "time",
                                                                    "sensor_id"]),
              {"compression": "gzip", "use_dictionary": False, "data_page_version": "2.0"}),
             (plain.set_column(4, "event_id", plain["event_id"].dictionary_encode()),
              {"row_group_size": 10**6}),
             (pa.concat_tables(gaps), {})]
    meta = meta_table({number: events for number in range(1, len(files) + 1)}).to_pydict()
    for i in range(len(meta["batch_id"])):
        if meta["batch_id"][i] == len(files):
            shift = 2 if meta["first_pulse_index"][i] == 0 else 6
            meta["first_pulse_index"][i] += shift
            meta["last_pulse_index"][i] += shift
    folder = tmp_path / "raw"
    (folder / "train").mkdir(parents=True)
    write_geometry(folder)
    pq.write_table(pa.table(meta), folder / "train_meta.parquet", row_group_size=11)
    for number, (table, options) in enumerate(files, start=1):
        pq.write_table(table, folder / f"train/batch_{number}.parquet", **options)
    run_ok("prepare.py", f"--input_dir={folder}", f"--data_dir={tmp_path}/data",
           f"--splits={{'all': (1, {len(files)})}}")
    split = data.open_split(tmp_path / "data", "all")
    n, n_pulses = len(events), len(split.pulses) // len(files)
    for i in range(len(files)):
        part = split.events[i * n:(i + 1) * n].copy()
        part["start"] -= i * n_pulses
        assert part.tobytes() == split.events[:n].tobytes(), i
        assert split.pulses[i * n_pulses:(i + 1) * n_pulses].tobytes() == split.pulses[:n_pulses].tobytes(), i


@pytest.mark.parametrize("chunk", [97, 1000, 4096])
def test_events_are_whole_however_the_files_are_cut(raw, monkeypatch, chunk):
    """97 and 1000 pulses at a time: an event of 5000 goes on over many pieces."""
    def read():
        meta = list(prepare.kaggle_meta(raw[0] / "train_meta.parquet", {1, 2}))
        parts = list(prepare.kaggle_chunks(raw[0] / "train/batch_2.parquet", meta[1][2], 5160))
        numbers, rows, _ = zip(*meta)
        return [*numbers], [*rows], [np.concatenate(part) for part in zip(*parts)], len(parts)

    numbers, rows, whole, n = read()
    assert n == 1 and numbers == [1, 2] and rows == [0, N_EVENTS[1]]
    monkeypatch.setattr(prepare, "CHUNK", chunk)
    cut = read()
    assert cut[:2] == (numbers, rows) and cut[3] > 3
    for found, expected in zip(cut[2], whole):
        assert found.tobytes() == expected.tobytes()


# ------------------------------------------------------------------------------------------------------------
# workers, interruptions, settings
# ------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("rule", ["paper", "brightest"])
def test_the_bytes_do_not_depend_on_the_workers(raw, straight, tmp_path, rule):
    flags = [f"--input_dir={raw[0]}", SPLITS, f"--keep={rule}"]
    run_ok("prepare.py", *flags, f"--data_dir={tmp_path}/data", "--workers=3")
    if rule != "paper":
        run_ok("prepare.py", *flags, f"--data_dir={tmp_path}/one", "--workers=1")
    assert contents(tmp_path / "data") == contents(straight[0] if rule == "paper" else tmp_path / "one")


@pytest.fixture(scope="module")
def slow(tmp_path_factory):
    """Enough batches to be stopped among them, and what a straight run makes of them."""
    folder = tmp_path_factory.mktemp("slow")
    events = make_events(np.random.default_rng(4), 150)
    write_kaggle(folder / "raw", {number: events for number in range(1, 41)}, row_group_size=10**6)
    command = [sys.executable, str(ROOT / "prepare.py"), f"--input_dir={folder}/raw",
               "--splits={'all': (1, 40)}", "--workers=2"]
    subprocess.run([*command, f"--data_dir={folder}/straight"], check=True, cwd=ROOT, capture_output=True)
    return folder, command


@pytest.mark.parametrize("stop", [signal.SIGKILL, signal.SIGINT])
def test_stopped_and_gone_on_is_as_never_stopped(slow, tmp_path, stop):
    folder, command = slow
    target = tmp_path / "data"
    command = [*command, f"--data_dir={target}"]
    process = subprocess.Popen(command, cwd=ROOT, start_new_session=True, preexec_fn=hear_ctrl_c,
                               stderr=subprocess.PIPE, text=True)
    while not list(target.glob("unfinished/all_*.json")):
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.005)
    if stop == signal.SIGINT:
        os.killpg(process.pid, stop)  # as a terminal does
    else:
        process.send_signal(stop)
    error = process.communicate(timeout=30)[1]
    assert process.returncode == (130 if stop == signal.SIGINT else -stop) and "Traceback" not in error, error
    assert stop != signal.SIGINT or "give the same command again" in error
    n_done = len(list(target.glob("unfinished/all_*.json")))
    assert not (target / "meta.json").exists() and n_done < 40

    with pytest.raises(SystemExit, match="never finished; to go on, run: python .*prepare.py .*--workers=2"):
        data.read_meta(target)
    assert "seed = 0, now it is 1" in user_error("prepare.py", *command[2:], "--seed=1")  # not from there on
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(re.search(r"(\d+)/6000", done.stderr)[1]) >= 150 * n_done  # the bar begins there
    assert contents(target) == contents(folder / "straight")
    for _ in range(100):  # the workers of the first run ended with it
        if not subprocess.run(["pgrep", "-g", str(process.pid)], capture_output=True, check=False).stdout:
            break
        time.sleep(0.1)
    else:
        raise AssertionError("workers of the killed run are still there")


def test_a_complete_folder_is_left_alone(raw, straight, tmp_path):
    target = tmp_path / "data"
    shutil.copytree(straight[0], target)
    before = contents(target)
    done = run_ok("prepare.py", f"--input_dir={raw[0]}", f"--data_dir={target}", "--workers=2", SPLITS)
    assert "complete, nothing to do" in done.stdout
    shutil.copytree(raw[0], tmp_path / "other")
    for flags, words in (([SPLITS, "--seed=4"], "seed = 0, now it is 4"),
                         ([SPLITS, "--max_pulses=64"], "max_pulses = 127"),
                         ([SPLITS, "--keep=brightest"], "keep = 'paper'"),
                         (["--splits={'val': (3, 3)}"], "splits = "),
                         ([SPLITS, f"--input_dir={tmp_path}/other"], "input_dir = ")):
        line = user_error("prepare.py", f"--input_dir={raw[0]}", f"--data_dir={target}", *flags)
        assert words in line and "choose another data_dir" in line
    assert contents(target) == before and "younger" not in done.stdout
    os.utime(target / "meta.json", (0, 0))
    done = run_ok("prepare.py", f"--input_dir={raw[0]}", f"--data_dir={target}", SPLITS)
    assert "train_meta.parquet is younger" in done.stdout
    os.truncate(target / "val_pulses.bin", 100)
    assert "val_pulses.bin" in user_error("prepare.py", f"--input_dir={raw[0]}", f"--data_dir={target}",
                                          SPLITS)


def test_a_geometry_mended_between_two_runs(raw, straight, tmp_path):
    """Centres and motions of the batches that were done are of the wrong one."""
    source = shutil.copytree(raw[0], tmp_path / "raw")
    write_geometry(source, GEOMETRY + [0, 0, 50])
    change(source / B, "sensor_id", 1234, 5160)
    flags = [f"--input_dir={source}", f"--data_dir={tmp_path}/data", SPLITS, "--workers=1"]
    assert "row 1234" in user_error("prepare.py", *flags)
    assert list((tmp_path / "data").glob("*/pretrain_1.json"))
    for name in ("sensor_geometry.csv", B):
        shutil.copy(raw[0] / name, source / name)
    run_ok("prepare.py", *flags)
    found, expected = contents(tmp_path / "data"), contents(straight[0])
    assert all(found[name] == expected[name] for name in expected if name != "meta.json")


def test_a_folder_that_another_run_has_finished_meanwhile(raw, straight, tmp_path, monkeypatch):
    plan = prepare.plan_kaggle

    def slow_plan(config):
        batches = plan(config)
        shutil.copytree(straight[0], tmp_path / "data")
        return batches
    monkeypatch.setattr(prepare, "plan_kaggle", slow_plan)
    monkeypatch.setattr(sys, "argv", ["prepare.py", f"--input_dir={raw[0]}", f"--data_dir={tmp_path}/data",
                                      SPLITS, "--max_pulses=30"])
    with pytest.raises(SystemExit, match="another run has finished it meanwhile"):
        prepare.main()
    assert data.read_meta(tmp_path / "data")["max_pulses"] == 127


def test_a_full_disk(raw, straight, tmp_path, monkeypatch):
    """A limit on the size of files stands for the disk: pretrain_pulses.bin does not fit."""
    flags = [f"--input_dir={raw[0]}", f"--data_dir={tmp_path}/data", SPLITS, "--workers=2"]
    line = user_error("prepare.py", *flags,
                      preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (150_000, 150_000)))
    assert "pretrain_pulses.bin: no room" in line and not (tmp_path / "data/meta.json").exists()
    run_ok("prepare.py", *flags)
    assert contents(tmp_path / "data") == contents(straight[0])

    (tmp_path / "record.json").write_text("{}")  # of a batch whose file is gone: it counts no more
    monkeypatch.setattr(prepare, "reserve", lambda path, size: (tmp_path / "record.json").read_text())
    with pytest.raises(SystemExit, match="no room for its 0.0 MB"):
        prepare.make_room(tmp_path, {tmp_path / "gone.bin": 1000}, [tmp_path / "record.json"])
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(100, 99, 1))
    with pytest.raises(SystemExit, match="needs 1.0 MB, the disk has 0.0 MB free; make room"):
        prepare.make_room(tmp_path, {tmp_path / "big.bin": 1_000_000}, [])
    assert not (tmp_path / "big.bin").exists()


def test_a_disk_that_fills_while_running(raw, straight, tmp_path):
    """The files have their size, but writing to them fails: some file systems reserve no room."""
    shutil.copytree(raw[0], tmp_path / "raw")
    flags = [f"--input_dir={tmp_path}/raw", f"--data_dir={tmp_path}/data", SPLITS]
    change(tmp_path / "raw" / B, "charge", 2001, NAN)
    assert "row 2001" in user_error("prepare.py", *flags)  # in a worker: by then the files are there
    shutil.copy(raw[0] / B, tmp_path / "raw" / B)
    line = user_error("prepare.py", *flags,
                      preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (150_000, 150_000)))
    assert "_pulses.bin: cannot be written" in line and not (tmp_path / "data/meta.json").exists(), line
    run_ok("prepare.py", *flags)
    found, expected = contents(tmp_path / "data"), contents(straight[0])
    assert {name: found[name] for name in found if name != "meta.json"} \
        == {name: expected[name] for name in expected if name != "meta.json"}


# ------------------------------------------------------------------------------------------------------------
# hostile input: each case spoils a good folder in one way
# ------------------------------------------------------------------------------------------------------------

def change(path, column, row, value, kind=None):
    """Set one value of a parquet file."""
    table = pq.read_table(path)
    values = table[column].to_pylist()
    values[row] = value
    index = table.column_names.index(column)
    pq.write_table(table.set_column(index, column, pa.array(values, kind or table[column].type)), path)


def drop(path, column):
    pq.write_table(pq.read_table(path).drop_columns([column]), path)


def retype(path, column, kind):
    table = pq.read_table(path)
    pq.write_table(table.set_column(table.column_names.index(column), column, table[column].cast(kind)), path)


def spoil_middle(path):
    content = bytearray(path.read_bytes())
    content[2000:9000] = bytes(7000)
    path.write_bytes(content)


def edit(path, edit_lines):
    lines = path.read_text().splitlines()
    path.write_text("\n".join(edit_lines(lines)) + "\n")


B, M, T, G = "train/batch_2.parquet", "train_meta.parquet", "test_meta.parquet", "sensor_geometry.csv"
INF, NAN = float("inf"), float("nan")
FIRST = N_EVENTS[1]  # row of the meta table where batch 2 begins
CASES = {  # what is wrong: (how to spoil the file, the words that the error line must hold)
    "batch missing": (lambda f: (f / B).unlink(), [B, "no such file"]),
    "batch cut off": (lambda f: os.truncate(f / B, 5000), [B, "damaged"]),
    "batch empty": (lambda f: (f / B).write_bytes(b""), [B, "0 bytes"]),
    "batch without rows": (lambda f: pq.write_table(pq.read_table(f / B).slice(0, 0), f / B),
                           [M, f"row {FIRST}", "0 rows"]),
    "batch damaged inside": (lambda f: spoil_middle(f / B), [B]),
    "batch is no parquet": (lambda f: (f / B).write_text("sensor_id,time\n" * 99),
                            [B, "not a readable parquet"]),
    "meta missing": (lambda f: (f / M).unlink(), [M, "no such file"]),
    "meta cut off": (lambda f: os.truncate(f / M, 3000), [M, "damaged"]),
    "folder missing": (lambda f: shutil.rmtree(f / "train"), ["train/batch_1.parquet", "no such file"]),
    "no sensor_id": (lambda f: drop(f / B, "sensor_id"), [B, "no column sensor_id"]),
    "no event_id": (lambda f: drop(f / B, "event_id"), [B, "no column event_id"]),
    "no azimuth": (lambda f: drop(f / M, "azimuth"), [M, "no column azimuth"]),
    "sensor_id as float": (lambda f: retype(f / B, "sensor_id", pa.float32()), [B, "sensor_id", "float"]),
    "time as text": (lambda f: retype(f / B, "time", pa.string()), [B, "time", "string"]),
    "auxiliary as integer": (lambda f: retype(f / B, "auxiliary", pa.int8()), [B, "auxiliary", "int8"]),
    "zenith as text": (lambda f: retype(f / M, "zenith", pa.large_string()), [M, "zenith", "string"]),
    "sensor_id too large": (lambda f: change(f / B, "sensor_id", 1234, 5160), [B, "row 1234", "5160"]),
    "sensor_id negative": (lambda f: change(f / B, "sensor_id", 55, -1), [B, "row 55", "-1"]),
    "charge NaN": (lambda f: change(f / B, "charge", 2001, NAN), [B, "row 2001", "charge is nan"]),
    "charge infinite": (lambda f: change(f / B, "charge", 2001, INF), [B, "row 2001", "charge is inf"]),
    "charge negative": (lambda f: change(f / B, "charge", 0, -0.5), [B, "row 0", "charge is -0.5"]),
    "charge absent": (lambda f: change(f / B, "charge", 17, None), [B, "row 17", "no value", "charge"]),
    "time NaN": (lambda f: change(f / B, "time", 3, NAN, pa.float64()), [B, "row 3", "time is nan"]),
    "time negative": (lambda f: change(f / B, "time", 4, -7), [B, "row 4", "time is -7"]),
    "time absent": (lambda f: change(f / B, "time", 4, None), [B, "row 4", "no value", "time"]),
    "pulses beyond the file": (lambda f: pq.write_table(pq.read_table(f / B).slice(0, 4000), f / B),
                               [M, B, "4000 rows"]),
    "ranges overlap": (lambda f: change(f / M, "first_pulse_index", FIRST + 5, 3),
                       [M, f"row {FIRST + 5}", "batch 2", "overlap"]),
    "range reversed": (lambda f: change(f / M, "last_pulse_index", FIRST + 5, 3),
                       [M, f"row {FIRST + 5}", "reversed"]),
    "range negative": (lambda f: change(f / M, "first_pulse_index", FIRST, -1),
                       [M, f"row {FIRST}", "negative"]),
    "other event in the meta": (lambda f: change(f / M, "event_id", FIRST + 9, 12345),
                                [B, "event_id", "12345"]),
    "other event in the middle": (lambda f: change(f / B, "event_id", 300, 777), [B, "row 300", "777"]),
    "azimuth NaN": (lambda f: change(f / M, "azimuth", FIRST + 1, NAN),
                    [M, f"row {FIRST + 1}", "batch 2", "azimuth nan"]),
    "zenith absent": (lambda f: change(f / M, "zenith", FIRST + 1, None), [M, f"row {FIRST + 1}", "zenith"]),
    "zenith in degrees": (lambda f: change(f / M, "zenith", FIRST + 1, 91.0), [M, "radians"]),
    "energy of 0": (lambda f: change(f / M, "energy", FIRST + 2, 0.0),
                    [M, f"row {FIRST + 2}", "energy 0", "above 0 GeV"]),
    "unknown class": (lambda f: change(f / M, "event_class", FIRST + 2, 258, pa.int64()),
                      [M, f"row {FIRST + 2}", "event_class 258"]),
    "test without events": (lambda f: pq.write_table(pq.read_table(f / T).slice(0, 0), f / T),
                            [T, "no events", "'test'"]),
    "batches mixed": (lambda f: change(f / M, "batch_id", FIRST + 8, 1),
                      [M, f"row {FIRST + 8}", "batch 1", "sort"]),
    "geometry missing": (lambda f: (f / G).unlink(), [G, "no such file"]),
    "geometry without a DOM": (lambda f: edit(f / G, lambda rows: rows[:100] + rows[101:]),
                               [G, "sensor_id 99", "missing"]),
    "geometry with one twice": (lambda f: edit(f / G, lambda rows: rows + rows[7:8]),
                                [G, "sensor_id 6", "twice"]),
    "geometry with NaN": (lambda f: edit(f / G, lambda rows: [*rows[:9], "8,1.0,nan,2.0", *rows[10:]]),
                          [G, "row 8", "no value in y"]),
    "geometry with text": (lambda f: edit(f / G, lambda rows: [*rows[:9], "8,here,1,2", *rows[10:]]),
                           [G, "column x"]),
    "geometry of too many DOMs": (lambda f: edit(f / G, lambda rows: rows + rows[1:] * 12),
                                  [G, "67,080 rows", "65,535"]),
    "geometry of another detector": (lambda f: edit(f / G, lambda rows: rows[:-60]),
                                     ["train/batch_", "sensor_id is 51", "0..5099"]),
    "geometry with a bad string": (lambda f: edit(f / G, lambda rows: [rows[0] + ",string"] + [
        f"{row},{-1 if i == 7 else 0}" for i, row in enumerate(rows[1:])]), [G, "row 7", "string is -1"]),
    "geometry without header": (lambda f: edit(f / G, lambda rows: rows[1:]), [G, "no column"]),
}
BAD_SPLITS = {
    "{'a': (1, 3), 'b': (3, 3)}": ["batch 3", "'a'", "'b'"], "{'a': 'test', 'b': 'test'}": ["test set"],
    "{'a': (2, 9)}": [M, "no batch 5, 6, 7, 8, 9", "'a'"], "{'a': (3, 1)}": ["(first, last)"],
    "{'a': 3}": ["(first, last)"], "{'a/b': (1, 1)}": ["a/b"], "{}": ["empty"]}


def spoiled(raw, folder, case):
    """The command line for a case, on a copy of the good folder."""
    source = raw[0]
    if case in CASES:
        source = shutil.copytree(raw[0], folder / "raw")
        CASES[case][0](source)
    splits = SPLITS if case in CASES else f"--splits={case}"
    return [f"--input_dir={source}", f"--data_dir={folder}/data", splits, "--workers=1"]


@pytest.mark.parametrize("case", [*CASES, *BAD_SPLITS])
def test_hostile_input_is_one_clear_line(raw, tmp_path, case):
    line = user_error("prepare.py", *spoiled(raw, tmp_path, case))
    assert not (tmp_path / "data/meta.json").exists()
    for words in CASES[case][1] if case in CASES else BAD_SPLITS[case]:
        assert words in line, line
