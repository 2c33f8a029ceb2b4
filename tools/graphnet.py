"""SQLite databases of GraphNeT, as NuBench's -> the Kaggle layout.

    python -m tools.graphnet    # NuBench, unpacked into data/nubench_db
    python -m tools.graphnet --pulsemap=SplitInIcePulses --truth=truth --selections="{}"

A pulse without a charge is 1 p.e.; aux is by hlc, or local coincidence.
"""
import sqlite3
from dataclasses import dataclass, field
from itertools import chain, cycle
from pathlib import Path

import numpy as np

from data import uniform_hash
from tools.kaggle_layout import (Angles, convert, find_doms, is_complete,
                                 make_events, read_doms, read_table)
from utils import fail, load_config, run_main

EVENTS_AT_ONCE = 2000
# names of a column: in NuBench, in other files of Prometheus, in IceCube's
PULSES = {"event_id": ["event_no"], "time": ["t", "dom_time"],
          "charge": ["charge"], "hlc": ["hlc"]}
PULSES |= {axis: [f"sensor_pos_{axis}", f"dom_{axis}"] for axis in "xyz"}
TRUTH = {"event_id": ["event_no"],
         "pid": ["initial_state_type", "injection_type", "pid"],
         "interaction": ["interaction", "injection_interaction_type", "interaction_type"]}
TRUTH |= {name: [f"initial_state_{name}", f"injection_{name}", name]
          for name in ("azimuth", "zenith", "energy")}
OPTIONAL = "charge", "hlc", "energy", "pid", "interaction"

@dataclass
class GraphnetConfig:
    database: str = "data/nubench_db/merged/merged.db"  # or several joined by +
    pulsemap: str = "merged_photons+pulses_no_noise"  # table, or one per selection
    truth: str = "mc_truth"  # table of what caused the events
    geometry: str = "data/nubench_db/geometry.parquet"  # or Kaggle's, or .geo
    selections: dict = field(default_factory=lambda: {  # split: file; {} = all
        "pretrain": "data/nubench_db/selections/train_selection.parquet",
        "test": "data/nubench_db/selections/test_selection.parquet"})
    val_share: float = 0.1  # of the first selection, drawn at random
    out_dir: str = "data/nubench_raw"  # folder to write
    events_per_batch: int = 50_000  # per file; their pulses are in memory
    angles: Angles = "auto"  # which way they point; auto: by their names
    seed: int = 0  # of the draw, and of the shift, 10,000 +- 300 ns

def find_columns(path, database, table, choices):
    """Return {name: the table's column, or None if it has none}."""
    rows = database.execute(f'PRAGMA table_info("{table}")')
    columns, chosen = [row[1] for row in rows], {}
    for name, names in choices.items():
        chosen[name] = next((x for x in names if x in columns), None)
        if not chosen[name] and name not in OPTIONAL:
            fail(f"{path}: table {table}: no column {' or '.join(names)}, only "
                 f"{', '.join(columns) or 'none'}; set --pulsemap and --truth")
    return chosen

def look_up(path, database, table, choices, event_no):
    """Return {name: values} of these events' rows, in order; NULL is NaN."""
    columns = find_columns(path, database, table, choices)
    names = ", ".join(f'"{x}"' if x else "NULL" for x in columns.values())
    numbers = ", ".join(map(str, event_no))
    query = f'SELECT {names} FROM "{table}" WHERE event_no IN ({numbers}) ORDER BY event_no'
    types = [(name, "i8" if name == "event_id" else "f8") for name in columns]
    rows = np.fromiter(database.execute(query), types)
    return {name: rows[name] for name in columns}

def classify(pid, interaction):
    """Return event_class (n,): 1 track, 2 cascade, 0 unknown, as a tau."""
    flavour = np.abs(pid)  # Particle Data Group
    is_charged = interaction == 1  # current
    event_class = np.zeros(len(pid), np.uint8)
    event_class[(interaction == 2) | is_charged & (flavour == 12)] = 2
    event_class[is_charged & (flavour == 14) | (flavour == 13)] = 1
    return event_class

def read_events(config, detector, databases, table, event_no):
    """Yield results of make_events, some events at a time."""
    for path, database in databases:
        where = f"{path}: table {table}"
        for start in range(0, len(event_no), EVENTS_AT_ONCE):
            numbers = event_no[start:start + EVENTS_AT_ONCE]
            truth = look_up(path, database, config.truth, TRUTH, numbers)
            truth["event_class"] = classify(truth.pop("pid"), truth.pop("interaction"))
            numbers = truth["event_id"]  # those in this database
            pulses = look_up(path, database, table, PULSES, numbers)
            event = np.searchsorted(numbers, pulses["event_id"])
            dom = find_doms(detector, where, pulses["x"], pulses["y"], pulses["z"])
            charge = np.nan_to_num(pulses["charge"], nan=1)
            hlc = None if np.isnan(pulses["hlc"]).all() else pulses["hlc"] > 0
            yield make_events(config, detector, where, truth, event, dom,
                              pulses["time"], charge, hlc)

def plan_splits(config, known):
    """Return {split: (pulsemap, event_no ascending)}."""
    tables, splits = config.pulsemap.split("+"), {}
    selections = config.selections or {"pretrain": None}
    if len(tables) not in (1, len(selections)):
        fail(f"pulsemap: {len(tables)} tables for {len(selections)} selections")
    for (split, path), table in zip(selections.items(), cycle(tables)):
        event_no = read_table(path)["event_no"].to_numpy() if path else known
        splits[split] = table, np.unique(event_no)
    numbers = np.concatenate([event_no for _, event_no in splits.values()])
    if len(np.unique(numbers)) < len(numbers):
        fail("selections: some events are in two of them")
    known = np.sort(known)
    n_rows = known.searchsorted(numbers, "right") - known.searchsorted(numbers)
    for number, n in zip(numbers[n_rows != 1], n_rows[n_rows != 1]):
        fail(f"{config.database}: event_no {number} must be in table {config.truth} "
             f"once, not {n} times")
    if "val" not in splits:
        name = next(iter(splits))
        table, event_no = splits[name]
        is_val = uniform_hash(config.seed, event_no, np.int64(1)) < config.val_share
        splits |= {name: (table, event_no[~is_val]), "val": (table, event_no[is_val])}
    return splits

def main():
    config = load_config(GraphnetConfig, __doc__)
    if is_complete(config):
        return
    detector = read_doms(config.geometry)
    try:
        databases = []
        for path in config.database.split("+"):
            open(path, "rb").close()  # its error says enough
            uri = Path(path).absolute().as_uri()
            databases.append((path, sqlite3.connect(f"{uri}?mode=ro", uri=True)))
        columns = find_columns(*databases[0], config.truth, TRUTH)
        by_name = "source" if columns["zenith"] == "zenith" else "flight"  # IceCube's
        config.reading = by_name if config.angles == "auto" else config.angles
        query = f'SELECT event_no FROM "{config.truth}"'
        rows = chain(*(database.execute(query) for _, database in databases))
        splits = plan_splits(config, np.fromiter((number for number, in rows), np.int64))
        n_events = sum(len(event_no) for _, event_no in splits.values())
        events = {split: read_events(config, detector, databases, *x)
                  for split, x in splits.items()}
        convert(config, detector, events, n_events)
    except sqlite3.Error as error:
        fail(f"{config.database}: {error}")

if __name__ == "__main__":
    run_main(main)
