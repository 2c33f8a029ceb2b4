"""GraphNeT's SQLite databases, as NuBench's -> event files in the Kaggle layout, which prepare.py reads.

    python -m tools.graphnet                                         # NuBench, unpacked into data/nubench_db
    python -m tools.graphnet --database=merged.db --geometry=cluster.parquet --angles=source
    python -m tools.graphnet --pulsemap=SplitInIcePulses --truth=truth --selections="{}"

Prints a bar over the events, what was written, and the command to go on with, whose splits are those of the
selections: docs/nubench.md has the whole way. Some 300,000 pulses per second and core. The bytes are the same
for any number of workers. A run that was stopped goes on from its finished batches; a complete folder is left
as it is.

It needs an index on event_no in both tables, as GraphNeT makes them: then one event after another is looked
up, only those of the selections, in memory that does not grow with the database but for 65 bytes per event.
DOMs are found by their position. A pulse without a charge is 1 p.e.; aux is what the column hlc denies, or,
where there is none, the rule of local coincidence that simulate.py follows too. Times and the knob `angles`
are as in tools/prometheus.py: the first local coincidence lies near 10,000 ns, and the light is asked which
way the angles point.

Selections are tables (parquet, csv) with a column event_no, one for each split; their batches come one after
another, in order of event_no. A database may be sorted by what it holds, so that its last tenth is not like
the rest: unless a selection is named val, events of the first one are drawn for it.
"""
import shlex
import shutil
import sqlite3
import zlib
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from itertools import chain, islice
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from common import (count_cores, count_events, fail, first_line, hold_lock, progress_bar, read_json,
                    run_in_workers, run_stage, write_atomic, write_json)
from data import uniform_hash
from knobs import check_choice, check_not_negative, check_positive, load_config, print_knobs
from simulate import (META_SCHEMA, batch_paths, describe_geometry, join_meta, local_coincidence,
                      number_along_strings, write_detector)
from tables import CHUNK, MAX_FLOAT, to_numpy
from tools.layout import (MAX_TIME, MIN_ENERGY, READINGS, describe_place, event_tables, find_doms,
                          find_reading, find_record, print_next_command, print_readings, print_summary,
                          read_doms, read_table, score_readings, write_pulses)

# what a column may be called: in NuBench and what else comes from Prometheus, in IceCube's databases
PULSES = {"x": ("sensor_pos_x", "dom_x"), "y": ("sensor_pos_y", "dom_y"), "z": ("sensor_pos_z", "dom_z"),
          "time": ("t", "dom_time")}
PULSES_EXTRA = {"charge": ("charge",), "hlc": ("hlc",)}
TRUTH = {"azimuth": ("initial_state_azimuth", "injection_azimuth", "azimuth"),
         "zenith": ("initial_state_zenith", "injection_zenith", "zenith")}
TRUTH_EXTRA = {"energy": ("initial_state_energy", "injection_energy", "energy"),
               "pid": ("initial_state_type", "injection_type", "pid"),
               "interaction": ("interaction", "injection_interaction_type", "interaction_type")}


@dataclass
class GraphnetConfig:
    database: str = "data/nubench_db/merged/merged.db"  # SQLite
    pulsemap: str = "merged_photons+pulses_no_noise"  # its table of pulses, or one per selection, joined by +
    truth: str = "mc_truth"  # its table of what caused the events
    geometry: str = "data/nubench_db/geometry.parquet"  # GraphNeT's table of the DOMs, or Kaggle's csv
    selections: dict = field(default_factory=lambda: {  # split: file with event_no; {} = all, as "pretrain"
        "pretrain": "data/nubench_db/selections/train_selection.parquet",
        "test": "data/nubench_db/selections/test_selection.parquet"})
    val_share: float = 0.1  # of the first selection, drawn as split "val", if none has this name; 0 = none
    out_dir: str = "data/nubench_raw"  # folder to write
    events_per_batch: int = 50_000  # at most, per file
    angles: str = "flight"  # in the database: flight, source, zenith_flight or azimuth_flight
    seed: int = 0  # of the draw for val, and of the 300 ns by which the first coincidence is off 10,000 ns
    workers: int = 0  # processes; 0 = one per core

    def check(self):
        yield from check_positive(self, "events_per_batch")
        yield from check_not_negative(self, "seed", "workers")
        yield from check_choice(self, "angles", list(READINGS))
        if not 0 <= self.val_share < 1:
            yield f"val_share = {self.val_share}: must lie between 0 and 1"
        for split, path in self.selections.items():
            if not (isinstance(split, str) and split.isidentifier() and isinstance(path, str)):
                yield f"selections: {split!r} = {path!r}: write the split's name and a file, both in quotes"
        n_tables, n_selections = len(self.pulsemap.split("+")), max(len(self.selections), 1)
        if n_tables not in (1, n_selections):
            yield (f"pulsemap = {self.pulsemap!r}: {n_tables} tables for {n_selections} selections; name one "
                   "table, or one for each selection")


# ------------------------------------------------------------------------------
# the database
# ------------------------------------------------------------------------------

def open_database(path):
    """Open an SQLite file for reading. A copy that was cut off is found at once, not hours later."""
    if not path.is_file():
        fail(f"{path}: no such file; check database")
    try:
        with open(path, "rb") as file:
            header = file.read(100)
    except OSError as error:
        fail(f"{path}: cannot be read ({error.strerror})")
    if len(header) < 100 or header[:16] != b"SQLite format 3\0":
        fail(f"{path}: not an SQLite database; get it anew")
    # file format, section 1.3: bytes of a page, number of pages, and whether that number is to be believed
    page, n_pages = int.from_bytes(header[16:18], "big"), int.from_bytes(header[28:32], "big")
    size = (65536 if page == 1 else page) * n_pages
    if header[24:28] == header[92:96] and path.stat().st_size < size:
        fail(f"{path}: {path.stat().st_size:,} bytes, its header says {size:,}; cut off, get it anew")
    return sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True)


@contextmanager
def sqlite_errors(path, table):
    """Turn what SQLite finds wrong, and text where numbers should be, into one line."""
    try:
        yield
    except (sqlite3.Error, ValueError, TypeError) as error:
        fail(f"{path}: table {table} cannot be read ({first_line(error)}); get it anew")


def quoted(name):
    return '"' + name.replace('"', '""') + '"'


def find_columns(database, path, table, wanted, optional):
    """Check that there is such a table, that events are found in it fast, what it has -> {name: column}."""
    with sqlite_errors(path, table):
        tables = [name for name, in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
        columns = {column: (kind, is_key) for _, column, kind, _, _, is_key in
                   database.execute(f"PRAGMA table_info({quoted(table)})")}
        has_index = database.execute(
            "SELECT 1 FROM pragma_index_list(?) AS i, pragma_index_info(i.name) AS c "
            "WHERE i.partial = 0 AND c.seqno = 0 AND c.name = 'event_no'", (table,)).fetchone()
    if table not in tables:
        fail(f"{path}: no table {table}, only {', '.join(tables)}; correct --pulsemap or --truth")
    found = {name: next((column for column in choices if column in columns), None)
             for name, choices in (wanted | optional | {"event_no": ("event_no",)}).items()}
    for name in ("event_no", *wanted):
        if found[name] is None:
            fail(f"{path}: table {table} has no column {' or '.join(wanted.get(name, [name]))}, only "
                 f"{', '.join(columns)}; is it the right table?")
    is_key = columns["event_no"][0].upper() == "INTEGER" and columns["event_no"][1]
    if not (has_index or is_key and sum(key > 0 for _, key in columns.values()) == 1):
        sql = f"CREATE INDEX {quoted('event_no_' + table)} ON {quoted(table)} (event_no)"
        code = f"import sqlite3; sqlite3.connect({str(path)!r}).execute({sql!r})"
        fail(f"{path}: table {table} has no index on event_no: each event would cost a search through all of "
             f"it; make one, once: {shlex.join(['python', '-c', code])}")
    return {name: column for name, column in found.items() if column}


def read_numbers(rows, n_columns):
    """Rows that SQLite yields -> float64 (n, n_columns), NaN for NULL; event_no is exact below 2^53."""
    return np.fromiter(chain.from_iterable(rows), np.float64).reshape(-1, n_columns)


def look_up(database, table, columns, event_no):
    """A cursor over the rows of these events, one event after another, each in the order of the table."""
    # without a type, or SQLite would not use the index of a column that has none
    database.execute("CREATE TEMP TABLE IF NOT EXISTS wanted (event_no)")
    database.execute("DELETE FROM wanted")
    database.executemany("INSERT INTO wanted VALUES (?)", ((number,) for number in event_no.tolist()))
    names = ", ".join(f"found.{quoted(column)}" for column in columns)
    return database.execute(f"SELECT {names} FROM temp.wanted CROSS JOIN {quoted(table)} AS found "
                            "ON found.event_no = wanted.event_no ORDER BY wanted.rowid")


# ------------------------------------------------------------------------------
# plan: which events make up which batches
# ------------------------------------------------------------------------------

def events_with_pulses(database, table):
    """Each event_no of a table of pulses once, ascending: jumps through its index from one to the next."""
    rows = database.execute(
        f"WITH RECURSIVE lit(n) AS (SELECT min(event_no) FROM {quoted(table)} UNION ALL "
        f"SELECT (SELECT min(event_no) FROM {quoted(table)} WHERE event_no > n) FROM lit WHERE n IS NOT NULL"
        ") SELECT n FROM lit WHERE n IS NOT NULL")
    return read_numbers(rows, 1)[:, 0].astype(np.int64)


def read_selection(path):
    """The column event_no of a parquet or csv file -> int64, ascending, each once."""
    table = read_table(path, "selections are files with a column event_no")
    if "event_no" not in table.column_names or not pa.types.is_integer(table["event_no"].type):
        fail(f"{path}: no column event_no of integers, only {', '.join(table.column_names)}; write it anew")
    return np.unique(to_numpy(table["event_no"].combine_chunks(), path, 0, "event_no"))


def is_among(numbers, ascending):
    """Bool per number (n,): does the ascending array have it? numpy's sets take 20 times as long."""
    if len(ascending) == 0:
        return np.zeros(len(numbers), bool)
    place = np.searchsorted(ascending, numbers)
    return ascending[np.minimum(place, len(ascending) - 1)] == numbers


def plan_splits(config, database, selections):
    """-> {split: (pulsemap, event_no of those with pulses)}, how many events have none."""
    path = config.database
    with sqlite_errors(path, config.truth):
        rows = database.execute(f"SELECT event_no FROM {quoted(config.truth)} WHERE event_no IS NOT NULL")
        truth = np.sort(read_numbers(rows, 1)[:, 0].astype(np.int64))
    twice = truth[1:][truth[1:] == truth[:-1]]
    if len(twice):
        fail(f"{path}: table {config.truth} has event {twice[0]} more than once; name a table with one row "
             "per event")
    splits, lit, taken, n_dark = {}, {}, np.zeros(0, np.int64), 0
    tables = config.pulsemap.split("+")
    for (split, wanted), table in zip(selections.items(), tables * (len(selections) // len(tables))):
        if table not in lit:
            with sqlite_errors(path, table):
                lit[table] = events_with_pulses(database, table)
        asked, whose = (lit[table], f"table {table}") if wanted is None else (wanted, f"selection {split!r}")
        wanted = truth if wanted is None else wanted
        for bad, what in ((~is_among(asked, truth), f"no row in table {config.truth}"),
                          (is_among(asked, taken), "been selected before")):
            if bad.any():
                fail(f"{path}: {bad.sum():,} events of {whose} have {what}, the first is event "
                     f"{asked[bad][0]}; correct selections, or name other tables")
        event_no = wanted[is_among(wanted, lit[table])]
        if len(event_no) == 0:
            fail(f"{path}: no event of {whose} has a pulse in table {table}; name another pulsemap")
        taken, n_dark = np.sort(np.append(taken, wanted)), n_dark + len(wanted) - len(event_no)
        splits[split] = table, event_no
    first, (table, event_no) = next(iter(splits.items()))
    is_val = uniform_hash(config.seed, event_no, 1) < config.val_share  # 0 is the shift in time
    if "val" not in splits and is_val.any() and not is_val.all():
        drawn = {first: (table, event_no[~is_val]), "val": (table, event_no[is_val])}
        splits = drawn | {split: content for split, content in splits.items() if split != first}
    return splits, n_dark


def plan_batches(splits, events_per_batch):
    """-> list of (pulsemap, event_no) of each batch, {split: (first, last) of them}."""
    batches, ranges = [], {}
    for split, (table, event_no) in splits.items():
        first = len(batches) + 1
        batches += [(table, event_no[start:start + events_per_batch])
                    for start in range(0, len(event_no), events_per_batch)]
        ranges[split] = (first, len(batches))
    return batches, ranges


# ------------------------------------------------------------------------------
# what a worker does with a batch
# ------------------------------------------------------------------------------

def convert_batch(config, detector, places, number, table, event_no):
    """Write a batch file and its rows of the meta table -> what its light says of the angles."""
    pa.set_cpu_count(1)
    pulse_path, meta_path = batch_paths(Path(config.out_dir), "train", number)
    light, metas = [], []
    events = convert_events(config, detector, places, table, event_no, light)
    write_atomic(pulse_path, lambda part: metas.append(write_pulses(part, events, number)))
    write_atomic(meta_path, lambda part: pq.write_table(metas[0], part))
    return {"scores": score_readings(np.hstack(light))}


def convert_events(config, detector, places, table, event_no, light):
    """Yield tables of events and of their pulses, some events at a time; note what the light says."""
    database = open_database(Path(config.database))
    truth, rung, known = read_truth(config, database, event_no), number_along_strings(detector), {}
    for numbers, position, time, charge, hlc in read_pulses(config.database, database, table, event_no):
        lit, event = np.unique(numbers, return_inverse=True)
        order = np.lexsort((time, event))
        event, position, time, charge = event[order], position[:, order], time[order], charge[order]
        dom = find_doms(position, places, len(detector), known)
        if dom.min() < 0:
            i = int(dom.argmin())
            fail(f"{config.database}: table {table}: event {lit[event[i]]} has a pulse "
                 f"{describe_place(position[:, i], places)}")
        first = time[np.flatnonzero(np.diff(event, prepend=-1))]
        late = time - first[event] > MAX_TIME
        if late.any():
            fail(f"{config.database}: table {table}: event {lit[event[late][0]]} has pulses more than "
                 f"{MAX_TIME:g} ns apart; times must be in ns")
        is_dark = np.bincount(event, charge) <= 0
        if is_dark.any():
            fail(f"{config.database}: table {table}: event {lit[is_dark][0]} has no charge; leave it out of "
                 "the selections, and begin in another --out_dir")
        aux = ~(local_coincidence(event, rung[dom], time - first[event]) if hlc is None else hlc[order])
        row = np.searchsorted(event_no, lit)
        events, pulses, cosines = event_tables(
            config, detector, lit, {name: values[row] for name, values in truth.items()},
            event, dom, time, charge, aux)
        light.append(cosines)
        count_events(len(lit))
        yield events, pulses


def read_truth(config, database, event_no):
    """-> dict of azimuth, zenith, energy, event_class (n,) of these events."""
    path, table = config.database, config.truth
    columns = find_columns(database, Path(path), table, TRUTH, TRUTH_EXTRA)
    with sqlite_errors(path, table):
        rows = read_numbers(look_up(database, table, columns.values(), event_no), len(columns))
    truth = {name: np.full(len(event_no), np.nan) for name in TRUTH_EXTRA}
    truth |= {name: values for name, values in zip(columns, rows.T) if name != "event_no"}
    for name, low, high in (("azimuth", -6.284, 6.284), ("zenith", 0, 3.142),
                            ("energy", MIN_ENERGY, MAX_FLOAT)):
        if name in columns:
            refuse_values(path, table, event_no, columns[name], truth[name], low, high)
    interaction, flavour = truth.pop("interaction"), np.abs(truth.pop("pid"))  # 1 charged current, 2 neutral
    event_class = np.zeros(len(event_no), np.uint8)  # a tau of charged current may be either
    event_class[(interaction == 2) | (interaction == 1) & (flavour == 12)] = 2
    event_class[(interaction == 1) & (flavour == 14) | (flavour == 13)] = 1
    return truth | {"event_class": event_class}


def read_pulses(path, database, table, event_no):
    """Yield whole events, some thousand at a time: columns event_no, position (3, n), time, charge, hlc.

    hlc is None where the table does not tell.
    """
    columns = find_columns(database, Path(path), table, PULSES, PULSES_EXTRA)
    with sqlite_errors(path, table):
        cursor = look_up(database, table, columns.values(), event_no)
    rest = np.zeros((0, len(columns)))
    while True:
        with sqlite_errors(path, table):
            rows = read_numbers(islice(cursor, CHUNK), len(columns))
        is_last = len(rows) < CHUNK
        rows = np.concatenate([rest, rows])
        place = list(columns).index("event_no")
        # the event of the last row may go on
        end = len(rows) if is_last else np.searchsorted(rows[:, place], rows[-1, place])
        rows, rest = rows[:end], rows[end:]
        if end:
            pulses = dict(zip(columns, rows.T.copy()))
            number = pulses["event_no"].astype(np.int64)
            for name, values in pulses.items():
                low, high = {"charge": (0, MAX_FLOAT), "hlc": (0, 1)}.get(name, (-MAX_FLOAT, MAX_FLOAT))
                refuse_values(path, table, number, columns[name], values, low, high)
            yield (number, np.array([pulses[axis] for axis in "xyz"]), pulses["time"],
                   pulses.get("charge", np.ones(end)), pulses["hlc"] > 0 if "hlc" in pulses else None)
        if is_last:
            return


def refuse_values(path, table, event_no, column, values, low, high):
    bad = ~((values >= low) & (values <= high))
    if bad.any():
        i = int(bad.argmax())
        fail(f"{path}: table {table}: event {event_no[i]}: {column} is {values[i]}, must lie in {low:.4g}.."
             f"{high:.4g} (a NULL reads as nan); correct it, or leave the event out of the selections, and "
             "begin in another --out_dir")


# ------------------------------------------------------------------------------
# main
# ------------------------------------------------------------------------------

def main():
    config = load_config(GraphnetConfig, __doc__)
    out_dir, path = Path(config.out_dir), Path(config.database)
    detector, places = read_doms(Path(config.geometry))
    database = open_database(path)
    find_columns(database, path, config.truth, TRUTH, TRUTH_EXTRA)
    for table in config.pulsemap.split("+"):
        find_columns(database, path, table, PULSES, PULSES_EXTRA)
    selections = {split: read_selection(Path(file)) for split, file in config.selections.items()}

    # all that the bytes depend on
    settings = {key: value for key, value in asdict(config).items() if key not in ("out_dir", "workers")}
    with open(path, "rb") as file:
        crc = zlib.crc32(file.read(100))  # the header counts the changes
    settings["database"] = f"{path.stat().st_size} bytes, header with crc32 {crc:08x}"
    settings["geometry"] = describe_geometry(detector)
    settings["selections"] = {split: f"{len(numbers)} events with crc32 {zlib.crc32(numbers.tobytes()):08x}"
                              for split, numbers in selections.items()}
    record = out_dir / "graphnet.json"
    found = find_record(record, settings, "tools.graphnet")
    if found:
        print_readings(config, found["readings"])
        print(f"{out_dir} is complete, nothing to do")
        print_next_command(out_dir, found["splits"])
        return

    lock = hold_lock(out_dir)  # held until main() ends
    print_knobs(config)
    splits, n_dark = plan_splits(config, database, selections or {"pretrain": None})
    batches, ranges = plan_batches(splits, config.events_per_batch)
    write_json(record, settings)
    write_detector(out_dir, detector)
    records = {number: out_dir / ".parts" / f"batch_{number}.json" for number in range(1, len(batches) + 1)}
    todo = [(config, detector, places, number, *batches[number - 1]) for number, part in records.items()
            if not part.exists()]
    n_all, n_left = (sum(len(event_no) for *_, event_no in some) for some in (batches, todo))

    def done(job, result):
        number = job[3]
        write_json(records[number], result)
        reading = find_reading(result["scores"])
        if number == todo[0][3] and reading[0] not in (None, config.angles):  # early: it takes hours
            bar.clear()
            print_readings(config, [(*reading, 1, f"batch_{number}.parquet")])
    with progress_bar(n_all, "graphnet", "event", initial=n_all - n_left) as bar:
        workers = max(1, min(config.workers or count_cores(), len(todo)))
        run_in_workers(convert_batch, todo, workers, bar, done)

    metas = [batch_paths(out_dir, "train", number)[1] for number in records]
    lengths = join_meta(out_dir / "train_meta.parquet", META_SCHEMA, metas)
    scores = np.sum([read_json(part)["scores"] for part in records.values()], axis=0).tolist()
    readings = [(*find_reading(scores), len(batches), "batch_1.parquet")]
    print_summary(out_dir, len(batches), lengths, n_dark, "pulse")
    print_readings(config, readings)
    write_json(record, settings | {"n_batches": len(batches), "splits": ranges, "readings": readings})
    shutil.rmtree(out_dir / ".parts")
    print_next_command(out_dir, ranges)


if __name__ == "__main__":
    run_stage(main)
