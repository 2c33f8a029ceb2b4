"""GraphNeT's SQLite databases, as NuBench's -> the Kaggle layout, which
prepare.py reads.

    python -m tools.graphnet    # NuBench, unpacked into data/nubench_db
    python -m tools.graphnet --pulsemap=SplitInIcePulses --truth=truth --selections="{}"

Prints what was written, whether the light confirms `angles`, and the next
command. 500,000 pulses per second. A pulse without a charge is 1 p.e.;
aux is by the column hlc, or by local coincidence. See docs/own_data.md.
"""
import sqlite3
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path

import numpy as np

from data import uniform_hash
from tools.kaggle_layout import (Angles, convert, find_doms, is_complete,
                                 make_events, read_doms, read_table)
from utils import fail, load_config, run_main

EVENTS_AT_ONCE = 2000
# what a column may be called: in NuBench and what else comes from Prometheus, in IceCube's
PULSES = {"event_id": ["event_no"], "time": ["t", "dom_time"],
          "charge": ["charge"], "hlc": ["hlc"]}
PULSES |= {axis: [f"sensor_pos_{axis}", f"dom_{axis}"] for axis in "xyz"}
TRUTH = {"event_id": ["event_no"], "pid": ["initial_state_type", "injection_type", "pid"],
         "interaction": ["interaction", "injection_interaction_type", "interaction_type"]}
TRUTH |= {name: [f"initial_state_{name}", f"injection_{name}", name]
          for name in ("azimuth", "zenith", "energy")}
OPTIONAL = "charge", "hlc", "energy", "pid", "interaction"

@dataclass
class GraphnetConfig:
    database: str = "data/nubench_db/merged/merged.db"  # SQLite, or several joined by +
    pulsemap: str = "merged_photons+pulses_no_noise"  # table, or one per selection joined by +
    truth: str = "mc_truth"  # table of what caused the events
    geometry: str = "data/nubench_db/geometry.parquet"  # or Kaggle's csv, or a .geo file
    selections: dict = field(default_factory=lambda: {  # split: file; {} = all
        "pretrain": "data/nubench_db/selections/train_selection.parquet",
        "test": "data/nubench_db/selections/test_selection.parquet"})
    val_share: float = 0.1  # of the first selection, drawn: a database may be sorted
    out_dir: str = "data/nubench_raw"  # folder to write
    events_per_batch: int = 50_000  # per file; their pulses are in memory
    angles: Angles = "auto"  # which way they point; auto: by the columns, if the light agrees
    seed: int = 0  # of the draw, and of the shift, 10,000 +- 300 ns

def find_columns(database, path, table, choices):
    """Return {name: the table's column, or None if it has none}."""
    columns = [row[1] for row in database.execute(f'PRAGMA table_info("{table}")')]
    chosen = {name: next((column for column in names if column in columns), None)
              for name, names in choices.items()}
    missing = [choices[name] for name in chosen if not chosen[name] and name not in OPTIONAL]
    if missing:
        fail(f"{path}: table {table}: no column {' or '.join(missing[0])}, only "
             f"{', '.join(columns) or 'none'}; name another --pulsemap or --truth")
    return chosen

def look_up(database, table, columns, event_no):
    """Return {name: values} of these events' rows, in order; NULL is NaN."""
    # untyped, or SQLite would not use the index of an untyped column
    database.execute("CREATE TEMP TABLE IF NOT EXISTS wanted (event_no)")
    database.execute("DELETE FROM wanted")
    database.executemany("INSERT INTO wanted VALUES (?)", zip(event_no.tolist()))
    names = ", ".join(f't."{name}"' if name else "NULL" for name in columns.values())
    rows = database.execute(f'SELECT {names} FROM temp.wanted CROSS JOIN "{table}" AS t '
                            "ON t.event_no = wanted.event_no ORDER BY wanted.rowid")
    dtype = [(name, "i8" if name == "event_id" else "f8") for name in columns]
    rows = np.fromiter(rows, dtype)
    return {name: rows[name] for name in columns}

def plan_splits(config, known):
    """Return {split: (pulsemap, event_no ascending)}; no event may be in two splits."""
    splits, tables = {}, config.pulsemap.split("+")
    selections = config.selections or {"pretrain": None}
    if len(tables) not in (1, len(selections)):
        fail(f"pulsemap: {len(tables)} tables for {len(selections)} selections")
    for i, (split, path) in enumerate(selections.items()):
        event_no = read_table(path)["event_no"].to_numpy() if path else known
        splits[split] = tables[i % len(tables)], np.unique(event_no)
    numbers = np.concatenate([event_no for _, event_no in splits.values()])
    if len(np.unique(numbers)) < len(numbers):
        fail("selections: some events are in two of them")
    n_rows = np.diff(np.searchsorted(np.sort(known), [numbers, numbers + 1]), axis=0)[0]
    if (n_rows != 1).any():
        fail(f"{config.database}: event_no {numbers[n_rows != 1][0]} must be in table "
             f"{config.truth} once, not {n_rows[n_rows != 1][0]} times")
    if "val" not in splits:
        first = next(iter(splits))
        table, event_no = splits.pop(first)
        is_val = uniform_hash(config.seed, event_no, np.int64(1)) < config.val_share
        drawn = {first: (table, event_no[~is_val]), "val": (table, event_no[is_val])}
        splits = drawn | splits
    return splits

def read_events(config, detector, part, table, event_no):
    """Yield META and PULSE records of a database, some events at a time."""
    path, database, columns, known = part
    where, event_no = f"{path}: table {table}", np.intersect1d(event_no, known)
    for start in range(0, len(event_no), EVENTS_AT_ONCE):
        numbers = event_no[start:start + EVENTS_AT_ONCE]
        truth = look_up(database, config.truth, columns[config.truth], numbers)
        truth["event_class"] = classify(truth.pop("pid"), truth.pop("interaction"))
        pulses = look_up(database, table, columns[table], numbers)
        event = np.searchsorted(numbers, pulses["event_id"])
        dom = find_doms(detector, pulses["x"], pulses["y"], pulses["z"])
        charge = np.where(np.isnan(pulses["charge"]), 1, pulses["charge"])
        hlc = pulses["hlc"] > 0 if columns[table]["hlc"] else None
        yield make_events(config, detector, where, truth, event, dom, pulses["time"], charge, hlc)

def classify(pid, interaction):
    """Return event_class (n,): 1 track, 2 cascade, 0 unknown, as a tau."""
    flavour = np.abs(pid)  # Particle Data Group; 1: charged current, 2: neutral
    event_class = np.zeros(len(pid), np.uint8)
    event_class[(interaction == 2) | (interaction == 1) & (flavour == 12)] = 2
    event_class[(interaction == 1) & (flavour == 14) | (flavour == 13)] = 1
    return event_class

def main():
    config = load_config(GraphnetConfig, __doc__)
    if is_complete(config):
        return
    detector, parts = read_doms(config.geometry), []
    try:
        for path in config.database.split("+"):
            if Path(path).is_dir():
                fail(f"{path}: a folder; this tool reads SQLite, not GraphNeT's parquet files")
            open(path, "rb").close()  # its error says enough
            database = sqlite3.connect(f"{Path(path).absolute().as_uri()}?mode=ro", uri=True)
            columns = {table: find_columns(database, path, table, PULSES)
                       for table in config.pulsemap.split("+")}
            columns[config.truth] = find_columns(database, path, config.truth, TRUTH)
            rows = database.execute(f'SELECT event_no FROM "{config.truth}"')
            known = np.fromiter((number for number, in rows), np.int64)
            parts.append((path, database, columns, known))
        path, config.reading = config.database, config.angles
        if config.angles == "auto":  # IceCube's own columns point to the source
            config.reading = "source" if columns[config.truth]["zenith"] == "zenith" else "flight"
        splits = plan_splits(config, np.concatenate([part[-1] for part in parts]))
        chunks = {name: chain(*(read_events(config, detector, part, *split) for part in parts))
                  for name, split in splits.items()}
        n_events = sum(len(event_no) for _, event_no in splits.values())
        convert(config, detector, chunks, n_events)
    except sqlite3.Error as error:
        fail(f"{path}: {error}")

if __name__ == "__main__":
    run_main(main)
