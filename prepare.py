"""Stage 1: event files (Kaggle's or Prometheus' parquet) -> a data folder of .bin files that train.py maps into memory.

    python prepare.py sample_config/demo_prepare.py                    # what simulate.py wrote, seconds
    python prepare.py config/kaggle_prepare.py --workers=16            # the paper's splits: 102 M events, 77 GB of parquet
    python prepare.py sample_config/prometheus_prepare.py --input_dir=photons --splits="{'pretrain': (1, 9), 'val': (10, 10)}"

Prints one bar over the events, then a table of what each split holds, so that a wrong input is seen at once. A run that
was stopped, in whatever way, goes on with the same command and ends in the same bytes, for any number of workers.

What an event keeps (upstream's rule): all its pulses if they are at most max_pulses. Else all its good ones (aux = False,
in local coincidence) and random others; or, if the good ones alone are too many, a random max_pulses of those. The time
order stays. Total charge and charge centre are those of the full event.

Why nothing is merged at the end: how many pulses an event keeps follows from its length alone. So the meta table fixes the
place of every event before the first pulse is read, the files get their final size at once, and each worker writes its own
slice. Prometheus files have no such table: there each file is written aside first, then put in its place.
"""
import math
import os
import shlex
import shutil
import sys
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

from common import (count_cores, count_events, fail, hold_lock, progress_bar, read_json, run_in_workers, run_stage,
                    write_atomic, write_json)
from data import (DOMS_PER_STRING, EVENT, FORMAT_VERSION, N_DOMS, PULSE, UNFINISHED, describe_dtypes, local_coincidence,
                  open_split, read_meta, reserve, uniform_runs, write_records)
from knobs import check_choice, check_not_negative, load_config, print_knobs

CHUNK = 2**18  # pulses at a time, some 1,600 events: arrays of 2 MB stay in the cache
PROMETHEUS_Z = -1948.07  # [m] z of IceCube's centre in Prometheus' coordinates, whose zero is the surface
PROMETHEUS_ROWS = 10_000_000  # event_id there = this * number of the file + row in it
MAX_FLOAT = float(np.finfo(np.float32).max)


@dataclass
class PrepareConfig:
    source: str = "kaggle"  # "kaggle" (simulate.py writes that layout too) or "prometheus" (files of photons)
    input_dir: str = "data/kaggle"  # holds sensor_geometry.csv and train/, train_meta.parquet, ...; or photon files
    data_dir: str = "data/icecube"  # the data folder to write
    splits: dict = field(default_factory=lambda: {  # name: (first, last) batch, both included; "test": Kaggle's unlabelled set
        "pretrain": (1, 500), "finetune": (601, 605), "val": (651, 655)})
    max_pulses: int = 127  # pulses kept of an event: 128 positions with [CLS]
    merge_window: float = 3.3  # [ns] Prometheus: photons of a DOM this close are one pulse; a 300 MHz sample, arXiv:0810.4930
    seed: int = 0  # of the random choice among too many pulses
    workers: int = 0  # processes, each with a batch file of its own and 0.3 GB of memory; 0 = one a core

    def check(self):
        yield from check_choice(self, "source", ("kaggle", "prometheus"))
        yield from check_not_negative(self, "merge_window", "seed", "workers")
        if not 1 <= self.max_pulses <= 65535:
            yield f"max_pulses = {self.max_pulses}: must lie between 1 and 65535"
        if not self.splits:
            yield "splits is empty: nothing to prepare"
        for name, batches in self.splits.items():
            is_range = isinstance(batches, (tuple, list)) and len(batches) == 2 and all(type(n) is int for n in batches)
            if not (isinstance(name, str) and name.isidentifier()):
                yield f"splits: {name!r} cannot be the name of a file; use letters, digits and _"
            elif not (batches == "test" or is_range and 0 <= batches[0] <= batches[1]):
                yield f"splits: {name!r} = {batches!r}: write (first, last) batch, or 'test'"
            elif batches == "test" and self.source == "prometheus":
                yield f"splits: {name!r} = 'test': only Kaggle has an unlabelled test set"
        for (a, x), (b, y) in combinations(self.splits.items(), 2):
            if x == y == "test" or "test" not in (x, y) and max(x[0], y[0]) <= min(x[1], y[1]):
                what = "the test set" if x == "test" else f"batch {max(x[0], y[0])}"
                yield f"splits: {what} is in {a!r} and in {b!r}; an event may be in one split only"


@dataclass
class Batch:
    """One file of events, and where it goes."""
    split: str
    number: int
    path: Path
    n_events: int  # any number  # DIFF(upstream): there the last one, of 153,924, fails; Prometheus: some may hold no photon
    n_pulses: int  # to keep; Prometheus: at most
    events_path: Path
    pulses_path: Path
    first_event: int = 0  # place in events_path
    first_pulse: int = 0  # place in pulses_path


# ----------------------------------------------------------------------------------------------------------------------
# the rule: which pulses an event keeps
# ----------------------------------------------------------------------------------------------------------------------

def pack(events, time, charge, dom, aux, geometry, config):
    """Whole events -> the PULSE records they keep, one event after another; completes `events` in place.

    events: EVENT records with n_pulses set; time, charge, dom, aux: all their pulses, one event after another;
    geometry: DOM positions (3, 5160) [m].
    """
    n = events["n_pulses"].astype(np.int64)
    offset = np.cumsum(n) - n
    goes_back = time[1:] < time[:-1]
    goes_back[offset[1:] - 1] = False  # from one event to the next it may
    if goes_back.any():
        order = np.lexsort((time, np.repeat(np.arange(len(n)), n)))  # stable: ties stay as they are in the file
        time, charge, dom, aux = time[order], charge[order], dom[order], aux[order]

    charge = charge.astype(np.float64, copy=False)
    total = np.add.reduceat(charge, offset)
    place = dom.astype(np.intp)  # as take wants it, converted once for the three; "clip" spares a check of the range
    for axis in range(3):
        moment = np.add.reduceat(charge * geometry[axis].take(place, mode="clip"), offset)
        events["center"][:, axis] = moment / np.where(total > 0, total, 1)
    events["total_charge"] = total
    events["length"] = np.minimum(n, config.max_pulses)

    keep = slice(None)
    is_long = n > config.max_pulses
    if is_long.any():
        # a draw for each pulse, good ones before all others; an event keeps its max_pulses smallest
        # DIFF(upstream): a hash of event and pulse, so that no order of batches or workers can change it
        in_long, n_long = np.repeat(is_long, n), n[is_long]
        draw = uniform_runs(config.seed, events["event_id"][is_long], n_long)
        draw += aux[in_long]
        begin, ordered = np.cumsum(n_long) - n_long, draw.copy()
        for a, b in zip(begin.tolist(), (begin + n_long).tolist()):
            ordered[a:b].partition(config.max_pulses - 1)
        keep = ~in_long
        keep[in_long] = draw <= np.repeat(ordered[begin + config.max_pulses - 1], n_long)
        keep = np.flatnonzero(keep)  # once, for four columns

    pulses = np.empty(events["length"].sum(dtype=np.int64), PULSE)  # two equal draws would not fit: once in 10^9 batches
    pulses["time"], pulses["charge"], pulses["dom"], pulses["aux"] = time[keep], charge[keep], dom[keep], aux[keep]
    return pulses


# ----------------------------------------------------------------------------------------------------------------------
# reading parquet, and refusing what is not right
# ----------------------------------------------------------------------------------------------------------------------

def is_number(kind):
    return pa.types.is_integer(kind) or pa.types.is_floating(kind)


def is_list(kind):
    return pa.types.is_list(kind) or pa.types.is_large_list(kind)


KINDS = {"integer": pa.types.is_integer, "number": is_number, "boolean": pa.types.is_boolean,  # what a column must be of
         "list of integers": lambda kind: is_list(kind) and pa.types.is_integer(kind.value_type),
         "list of numbers": lambda kind: is_list(kind) and is_number(kind.value_type)}


def refuse(bad, path, row, what):
    """Stop with one line at the first bad row, if there is one. bad: one bool a row; row: number of the first of them."""
    if bad.any():
        index = int(np.argmax(bad))
        fail(f"{path}: row {row + index}: {what(index)}")


def refuse_outside(values, low, high, path, row, name):
    if len(values) and not (values.min() >= low and values.max() <= high):  # NaN fails as well
        refuse(~((values >= low) & (values <= high)), path, row,
               lambda i: f"{name} is {values[i]}, must lie in {low}..{high:.4g}; the file is damaged or of another kind")


def column_type(schema, name):
    """The type of a column (photons.t is one inside a struct), None if there is none."""
    kind = pa.struct(list(schema))
    for part in name.split("."):
        if not pa.types.is_struct(kind) or kind.get_field_index(part) < 0:
            return None
        kind = kind.field(part).type
    return kind.value_type if pa.types.is_dictionary(kind) else kind


def open_parquet(path, columns, optional=()):
    """Open a parquet file and check that it has the columns (name: one of KINDS) -> file, names of those it has."""
    if not path.is_file():
        fail(f"{path}: no such file; check input_dir and splits")
    try:
        # in pieces of 1 MB: the default holds all that was read of a file, 9 GB of the full train_meta.parquet
        file = pq.ParquetFile(path, buffer_size=2**20, pre_buffer=False)
    except (pa.ArrowException, OSError) as error:
        fail(f"{path}: not a readable parquet file ({str(error).splitlines()[0]}); it is cut off or damaged, get it anew")
    found = []
    for name, wanted in (columns | dict(optional)).items():
        kind = column_type(file.schema_arrow, name)
        if kind is None and name in columns:
            fail(f"{path}: no column {name}, only {', '.join(file.schema_arrow.names)}; is it the right file?")
        if kind is not None and not KINDS[wanted](kind):
            fail(f"{path}: column {name} is of type {kind}, need {wanted}; write it anew")
        if kind is not None:
            found.append(name)
    return file, found


def read_batches(file, path, columns, n_rows):
    """Yield (row, RecordBatch) over a parquet file, n_rows at a time; row is the number of the first of them."""
    row = 0
    batches = file.iter_batches(n_rows, columns=columns, use_threads=False)  # one core a worker
    while True:
        try:
            batch = next(batches, None)
        except (pa.ArrowException, OSError) as error:
            fail(f"{path}: damaged after row {row} ({str(error).splitlines()[0]}); get it anew")
        if batch is None:
            return
        yield row, batch
        row += len(batch)


def to_numpy(array, path, row, name):
    if array.null_count:
        refuse(array.is_null().to_numpy(zero_copy_only=False), path, row, lambda i: f"no value in {name}; write it anew")
    if pa.types.is_dictionary(array.type):
        array = array.dictionary_decode()
    return array.to_numpy(zero_copy_only=False)


def read_geometry_csv(path):
    """sensor_geometry.csv (columns sensor_id, x, y, z [m]) -> positions (3, 5160) float64."""
    if not path.is_file():
        fail(f"{path}: no such file; input_dir must hold it beside the event files (simulate.py writes such a folder)")
    try:
        table = pa.csv.read_csv(path)
    except (pa.ArrowException, OSError) as error:
        fail(f"{path}: not a readable table ({str(error).splitlines()[0]}); it needs the columns sensor_id,x,y,z")
    columns = []
    for name, wanted in (("sensor_id", "integer"), ("x", "number"), ("y", "number"), ("z", "number")):
        if name not in table.column_names or not KINDS[wanted](table[name].type):
            fail(f"{path}: no column {name} of type {wanted}; it must begin with the line sensor_id,x,y,z")
        columns.append(to_numpy(table[name].combine_chunks(), path, 0, name))
    dom, *position = columns
    refuse_outside(dom, 0, N_DOMS - 1, path, 0, "sensor_id")
    refuse(~np.isfinite(position).all(axis=0), path, 0, lambda i: f"sensor_id {dom[i]} has no finite position; get it anew")
    count = np.bincount(dom, minlength=N_DOMS)
    if (count != 1).any():
        bad = int(np.argmax(count != 1))
        fail(f"{path}: sensor_id {bad} is {'missing' if count[bad] == 0 else 'there twice'}; get it anew")
    return np.array(position, np.float64)[:, np.argsort(dom)]


# ----------------------------------------------------------------------------------------------------------------------
# Kaggle
# ----------------------------------------------------------------------------------------------------------------------

KAGGLE_PULSES = {"time": "number", "charge": "number", "sensor_id": "integer", "auxiliary": "boolean", "event_id": "integer"}
KAGGLE_META = {"batch_id": "integer", "event_id": "integer", "first_pulse_index": "integer", "last_pulse_index": "integer"}
KAGGLE_LABELS = {"azimuth": "number", "zenith": "number"}
KAGGLE_EXTRA = {"energy": "number", "event_class": "integer"}  # simulate.py writes them, Kaggle does not


def plan_kaggle(config):
    """Find the batches of all splits, check them against the meta tables, give each its place -> list of Batch."""
    folder = Path(config.input_dir)
    split_of = {number: name for name, batches in config.splits.items() if batches != "test"
                for number in range(batches[0], batches[1] + 1)}
    test_split = next((name for name, batches in config.splits.items() if batches == "test"), None)
    batches = []
    for kind in ["train"] * bool(split_of) + ["test"] * bool(test_split):
        meta = folder / f"{kind}_meta.parquet"
        for number, row, events in kaggle_meta(meta, split_of if kind == "train" else None):
            path = folder / kind / f"batch_{number}.parquet"
            n_rows, end = open_parquet(path, KAGGLE_PULSES)[0].metadata.num_rows, events["start"] + events["n_pulses"]
            refuse(end > n_rows, meta, row, lambda i: f"event {events['event_id'][i]} of batch {number} ends at pulse "
                                                      f"{end[i] - 1}, but {path} has {n_rows} rows; get both files anew")
            split = split_of[number] if kind == "train" else test_split
            n_kept = int(np.minimum(events["n_pulses"], config.max_pulses).sum(dtype=np.int64))
            batches.append(Batch(split, number, path, len(events), n_kept, *split_paths(config, split)))
        missing = sorted(split_of.keys() - {batch.number for batch in batches}) if kind == "train" else ()
        if missing:
            fail(f"{meta}: has no batch {', '.join(map(str, missing[:8]))}{', ...' * (len(missing) > 8)}, which split "
                 f"{split_of[missing[0]]!r} asks for; correct splits or input_dir")
    batches.sort(key=lambda batch: (list(config.splits).index(batch.split), batch.number))
    for before, batch in zip(batches[:-1], batches[1:]):
        if before.split == batch.split:
            batch.first_event, batch.first_pulse = before.first_event + before.n_events, before.first_pulse + before.n_pulses
    return batches


def kaggle_meta(path, wanted):
    """Yield (number, row, EVENT records) of the wanted batches of a meta table; None = all, and no labels asked for.

    row is where the batch begins in the table; `start` is the event's first row in the batch file, for the time being.
    The table has 132 M rows: it is streamed, one batch at a time is in memory.
    """
    file, columns = open_parquet(path, KAGGLE_META | (KAGGLE_LABELS if wanted else {}), KAGGLE_EXTRA)
    number, first_row, pieces, seen = None, 0, [], set()
    for row, table in read_batches(file, path, columns, CHUNK):
        table = {name: to_numpy(table.column(name), path, row, name) for name in columns}
        borders = [0, *(np.flatnonzero(np.diff(table["batch_id"])) + 1), len(table["batch_id"])]
        for a, b in zip(borders[:-1], borders[1:]):
            if table["batch_id"][a] != number:
                if pieces:
                    yield number, first_row, kaggle_events(path, first_row, pieces)
                number, first_row, pieces = int(table["batch_id"][a]), row + a, []
                if number in seen:
                    fail(f"{path}: row {first_row}: the rows of batch {number} are not together; sort the table by batch_id")
                seen.add(number)
            if wanted is None or number in wanted:
                pieces.append({name: values[a:b] for name, values in table.items()})
    if pieces:
        yield number, first_row, kaggle_events(path, first_row, pieces)


def kaggle_events(path, row, pieces):
    """The rows of one batch in the meta table, the first of them row `row` -> EVENT records."""
    table = {name: np.concatenate([piece[name] for piece in pieces]) for name in pieces[0]}
    first, last = table["first_pulse_index"].astype(np.int64), table["last_pulse_index"].astype(np.int64)

    def name(i):
        return f"event {table['event_id'][i]} of batch {table['batch_id'][i]}"
    refuse((first < 0) | (last < first), path, row,
           lambda i: f"{name(i)} has the pulses {first[i]} to {last[i]}, reversed or negative; get the table anew")
    refuse(np.append(False, first[1:] <= last[:-1]), path, row,
           lambda i: f"{name(i)} begins at pulse {first[i]}, the event before it ends at {last[i - 1]}: they overlap or are "
                     "out of order; get the table anew")
    events = np.zeros(len(first), EVENT)
    events["event_id"], events["start"], events["n_pulses"] = table["event_id"], first, last - first + 1
    for label in ("azimuth", "zenith", "energy"):
        events[label] = table.get(label, np.nan)
    events["event_class"] = table.get("event_class", 0)
    if "azimuth" in table:
        good = (np.abs(table["azimuth"]) <= 6.2832) & (table["zenith"] >= 0) & (table["zenith"] <= 3.1416)
        refuse(~good, path, row, lambda i: f"{name(i)} has azimuth {table['azimuth'][i]}, zenith {table['zenith'][i]}; a "
                                           "labelled split needs angles in radians")
    return events


def kaggle_jobs(config, batches):
    """Yield (Batch, EVENT records) as the meta tables are streamed once more: all records at once would be 5 GB."""
    for kind in ("train", "test"):
        todo = {batch.number: batch for batch in batches if (config.splits[batch.split] == "test") == (kind == "test")}
        meta = Path(config.input_dir) / f"{kind}_meta.parquet"
        for number, _, events in kaggle_meta(meta, todo if kind == "train" else None) if todo else ():
            if number in todo:
                yield todo[number], events


def kaggle_chunks(path, events):
    """Yield some thousand events at a time with all their pulses: events, time, charge, dom, aux."""
    file, columns = open_parquet(path, KAGGLE_PULSES)
    first, end = events["start"].copy(), events["start"] + events["n_pulses"]

    def chunk(a, b, table, row):
        """Events a to b, whose pulses are all in this table; its first row is row `row` of the file."""
        n, rows = end[a:b] - first[a:b], slice(first[a] - row, end[b - 1] - row)
        if n.sum() < end[b - 1] - first[a]:  # some pulses belong to no event
            rows = np.arange(n.sum()) + np.repeat(first[a:b] - row - np.cumsum(n) + n, n)
        time, charge, dom, aux, event_id = (table[name][rows] for name in KAGGLE_PULSES)
        # every pulse is asked for its event: decoding event_id takes 1/10 of the time that the other columns take
        owner = np.repeat(events["event_id"][a:b], n)
        if (event_id != owner).any():
            i = int(np.argmax(event_id != owner))
            fail(f"{path}: row {row + np.arange(end[b - 1] - row)[rows][i]}: event_id is {event_id[i]}, the meta table has "
                 f"{owner[i]} there; the two files do not belong together, get both anew")
        return events[a:b], time, charge, dom, aux

    done, broken = 0, None  # events given out; the pulses so far of the event that goes on in the next table
    for row, table in read_batches(file, path, columns, CHUNK):
        table = {name: to_numpy(table.column(name), path, row, name) for name in columns}
        for name, high in (("time", MAX_FLOAT), ("charge", MAX_FLOAT), ("sensor_id", N_DOMS - 1)):
            refuse_outside(table[name], 0, high, path, row, name)
        n_read = row + len(table["time"])
        if broken:
            broken = {name: np.append(values, table[name][:end[done] - row]) for name, values in broken.items()}
            if end[done] > n_read:
                continue
            yield chunk(done, done + 1, broken, first[done])
            done, broken = done + 1, None
        ready = int(np.searchsorted(end, n_read, side="right"))
        if ready > done:
            yield chunk(done, ready, table, row)
            done = ready
        if done < len(events) and first[done] < n_read:
            broken = {name: values[first[done] - row:].copy() for name, values in table.items()}


# ----------------------------------------------------------------------------------------------------------------------
# Prometheus
# ----------------------------------------------------------------------------------------------------------------------

PROMETHEUS = {**{f"mc_truth.initial_state_{name}": "number" for name in ("energy", "azimuth", "zenith")},
              **{f"photons.{name}": "list of integers" for name in ("string_id", "sensor_id")},
              **{f"photons.{name}": "list of numbers" for name in ("t", "sensor_pos_x", "sensor_pos_y", "sensor_pos_z")}}
FINAL_STATES = {f"mc_truth.final_state_{name}": "list of numbers" for name in ("energy", "azimuth", "zenith")}  # optional


def prometheus_files(config):
    return sorted(Path(config.input_dir).glob("*.parquet"))


def n_photons(meta):
    leaf = [meta.schema.column(i).path.startswith("photons.t.") for i in range(len(meta.schema))].index(True)
    return sum(meta.row_group(i).column(leaf).num_values for i in range(meta.num_row_groups))


def plan_prometheus(config):
    """Find the photon files of all splits -> list of Batch, each with files of its own: their lengths are not known yet."""
    files = prometheus_files(config)
    batches = []
    for split, (first, last) in config.splits.items():
        if not 1 <= first <= last <= len(files):
            fail(f"{config.input_dir}: split {split!r} wants the files {first} to {last}, there are {len(files)} .parquet "
                 "files (numbered from 1 in sorted order); correct splits or input_dir")
        for number in range(first, last + 1):
            meta = open_parquet(files[number - 1], PROMETHEUS, FINAL_STATES)[0].metadata
            n_pulses = min(n_photons(meta), meta.num_rows * config.max_pulses)
            aside = [Path(config.data_dir) / UNFINISHED / path.name for path in split_paths(config, f"{split}_{number}")]
            batches.append(Batch(split, number, files[number - 1], meta.num_rows, n_pulses, *aside))
    return batches


def prometheus_chunks(batch, geometry, config):
    """Yield events at a time with all their pulses: events (angles as in the file), momentum, time, charge, dom, aux.

    momentum (n, 3) is that of the final states together, zero where the file has none. Photons carry neither charge nor
    aux: each counts 1 p.e., and aux is the rule of local coincidence that simulate.py follows too, so that masking, which
    hides aux = False pulses only, has something to hide. Times stay as they are: since the interaction, not around a trigger.
    """
    path = batch.path
    file, columns = open_parquet(path, PROMETHEUS, FINAL_STATES)
    mean_photons = max(1, n_photons(file.metadata) // max(1, file.metadata.num_rows))
    for row, table in read_batches(file, path, columns, max(1, CHUNK // mean_photons)):
        arrays = {f"{parent}.{child.name}": array for parent in ("mc_truth", "photons") for child, array in
                  zip(table.schema.field(parent).type, table.column(parent).flatten())}

        def lengths(name):
            return arrays[name].value_lengths().fill_null(0).to_numpy().astype(np.int64)

        def items(name, n):
            refuse(lengths(name) != n, path, row, lambda i: f"{name} is longer or shorter than its neighbours; make it anew")
            return to_numpy(arrays[name].flatten(), path, row, name)

        n = lengths("photons.t")
        event = np.repeat(np.arange(len(n)), n)  # row of each photon in this table
        time, string, sensor, *position = (items(f"photons.{name}", n) for name in (
            "t", "string_id", "sensor_id", "sensor_pos_x", "sensor_pos_y", "sensor_pos_z"))
        bad = ~((time >= 0) & (time <= MAX_FLOAT))
        if bad.any():
            fail(f"{path}: row {row + event[bad][0]}: a photon's t is {time[bad][0]}, must be 0 or later; make it anew")
        known = (string >= 1) & (string <= N_DOMS // DOMS_PER_STRING) & (sensor >= 1) & (sensor <= DOMS_PER_STRING)
        dom = np.where(known, (string - 1) * DOMS_PER_STRING + sensor - 1, 0)
        expected = geometry[:, dom] + [[0], [0], [PROMETHEUS_Z]]
        bad = ~(known & (np.abs(np.array(position) - expected) < 1).all(axis=0))  # [m]
        if bad.any():
            i = int(np.argmax(bad))
            fail(f"{path}: row {row + event[i]}: string {string[i]} sensor {sensor[i]} lies at "
                 f"{', '.join(f'{x[i]:.2f}' for x in position)}, in sensor_geometry.csv "
                 f"{'at ' + ', '.join(f'{x:.2f}' for x in expected[:, i]) if known[i] else 'there is none'}; this is another "
                 "detector, only IceCube-86 can be prepared")

        event, dom, time, charge = merge_photons(event, dom, time, config.merge_window)
        aux = ~local_coincidence(event, dom, time)
        lit = np.flatnonzero(n)  # an event without photons has nothing to learn from
        events = np.zeros(len(lit), EVENT)
        events["event_id"] = batch.number * PROMETHEUS_ROWS + row + lit
        events["n_pulses"] = np.bincount(event, minlength=len(n))[lit]
        for label in ("energy", "azimuth", "zenith"):
            values = to_numpy(arrays[f"mc_truth.initial_state_{label}"], path, row, f"initial_state_{label}")
            refuse(~np.isfinite(values), path, row, lambda i: f"initial_state_{label} is {values[i]}; make it anew")
            events[label] = values[lit]
        momentum = np.zeros((len(n), 3))
        if set(FINAL_STATES) <= set(columns):
            m = lengths("mc_truth.final_state_energy")
            energy, azimuth, zenith = (items(name, m) for name in FINAL_STATES)
            np.add.at(momentum, np.repeat(np.arange(len(n)), m), energy[:, None] * direction(azimuth, zenith))
        if len(lit):
            yield events, momentum[lit], time, charge, dom, aux


def merge_photons(event, dom, time, window):
    """Photons -> pulses (event, dom, time, charge), by event and time; a pulse lasts for `window` from its first photon.

    Each round finds one pulse of every DOM that has photons left: most have few, so few DOMs see many rounds.
    """
    order = np.lexsort((time, event * N_DOMS + dom))
    event, dom, time = event[order], dom[order], time[order]
    is_new = (np.diff(event * N_DOMS + dom, prepend=-1) != 0) | (np.diff(time, prepend=-np.inf) > window) | (window == 0)
    # photons of different groups never merge
    group, rest = np.cumsum(is_new), np.arange(len(time))
    while len(rest):
        first = np.diff(group[rest], prepend=0) != 0
        is_new[rest[first]] = True
        rest = rest[time[rest] - time[rest[first]][np.cumsum(first) - 1] > window]
    first = np.flatnonzero(is_new)
    charge = np.diff(first, append=len(time)).astype(np.float64)
    order = np.lexsort((time[first], event[first]))
    return event[first][order], dom[first][order], time[first][order], charge[order]


def direction(azimuth, zenith):
    return np.stack([np.cos(azimuth) * np.sin(zenith), np.sin(azimuth) * np.sin(zenith), np.cos(zenith)], axis=-1)


def flight_signs(batch, geometry, config):
    """Does (azimuth, zenith) of the file point along the flight? -> +1 or -1 for each of the two, and how it was found.

    Versions of Prometheus disagree. So up to 500 bright events are asked: a line fit to the good pulses (position =
    position_0 + velocity * time) moves along the flight, at least for tracks. Each of the four readings scores the sum of
    -ln(chance that a random direction lies as near to the fit); the best must beat the second by 3 standard deviations.
    The light of cascades does not tell. Then the momentum of the final states does, which Prometheus propagates; and
    without those, the angles are taken as those of the flight, the convention of its present code.
    """
    readings = np.array([(1, 1), (-1, 1), (1, -1), (-1, -1)])
    found, n_bright = [], 0
    for events, momentum, time, _, dom, aux in prometheus_chunks(batch, geometry, config):
        n, position, time = len(events), geometry[:, dom[~aux]], time[~aux]
        event = np.repeat(np.arange(n), events["n_pulses"])[~aux]
        count = np.bincount(event, minlength=n)
        time = time - (np.bincount(event, time, n) / np.maximum(count, 1))[event]
        velocity = np.stack([np.bincount(event, time * x, n) for x in position], axis=1)
        found.append((events, momentum, velocity, (count >= 8) & velocity.any(axis=1)))
        n_bright += int(found[-1][-1].sum())
        if n_bright >= 500:
            break
    if found:
        events, momentum, velocity, bright = (np.concatenate(parts) for parts in zip(*found))
        label = direction(events["azimuth"], events["zenith"])
        light, final = (np.einsum("ni,ni,ri->rn", vector, label, readings[:, [0, 0, 1]])
                        / np.maximum(np.linalg.norm(vector, axis=1), 1e-12) for vector in (velocity, momentum))  # cosines
        score = -np.log((1 - light[:, bright]) / 2 + 1e-3).sum(axis=1)  # 1e-3: a fit is not better than 4 degrees
        second, best = np.argsort(score)[-2:]
        if n_bright >= 3 and score[best] - score[second] > 3 * math.sqrt(2 * n_bright):
            return *readings[best].tolist(), "light"
        best = int(np.argmax(final.mean(axis=1)))
        if final[best].mean() > 0.9:
            return *readings[best].tolist(), "final states"
    return 1, 1, "convention"


# ----------------------------------------------------------------------------------------------------------------------
# what a worker does with one file
# ----------------------------------------------------------------------------------------------------------------------

@contextmanager
def writing(path):
    """Turn a full disk and the like into one line."""
    try:
        yield
    except OSError as error:
        fail(f"{error.filename or path}: cannot be written ({error.strerror}); correct that, the same command goes on")


def make_durable(*paths):
    for path in paths:
        with open(path, "rb") as file:
            os.fsync(file.fileno())


def write_batch(config, geometry, batch, events):
    """Write the slice of one batch -> what meta.json and the table at the end need to know of it."""
    pa.set_cpu_count(1)
    azimuth_sign = zenith_sign = flight_by = None
    chunks = kaggle_chunks(batch.path, events)
    if config.source == "prometheus":
        azimuth_sign, zenith_sign, flight_by = flight_signs(batch, geometry, config)
        chunks = ((part, *pulses) for part, _, *pulses in prometheus_chunks(batch, geometry, config))
    place, done = batch.first_pulse, [np.empty(0, EVENT)]
    n_aux, time, charge = 0, [math.inf, 0.0], [math.inf, 0.0]
    with writing(batch.pulses_path):
        if config.source == "prometheus":  # files of its own, which grow
            reserve(batch.events_path, 0)
            reserve(batch.pulses_path, 0)
        for part, *columns in chunks:
            pulses = pack(part, *columns, geometry, config)
            if part["total_charge"].min() <= 0:  # a pulse without charge does no harm, but here log10 is asked for
                fail(f"{batch.path}: event {part['event_id'][np.argmin(part['total_charge'])]} has no charge; get it anew")
            part["start"] = place + np.cumsum(part["length"], dtype=np.int64) - part["length"]
            write_records(batch.pulses_path, place, pulses)
            place += len(pulses)
            done.append(part)
            count_events(len(part))
            n_aux += int(np.count_nonzero(pulses["aux"]))
            for span, values in ((time, pulses["time"]), (charge, pulses["charge"])):
                span[:] = min(span[0], float(values.min())), max(span[1], float(values.max()))
        events = np.concatenate(done)
        count_events(batch.n_events - len(events))  # those without a photon
        if azimuth_sign == 1:  # along the flight; labels point to the source
            events["azimuth"] += math.pi
        if zenith_sign == 1:
            events["zenith"] = math.pi - events["zenith"]
        if config.source == "prometheus":
            events["azimuth"] %= 2 * math.pi
        write_records(batch.events_path, batch.first_event, events)
        make_durable(batch.events_path, batch.pulses_path)  # before the main process notes that this batch is done
    return {"n_events": len(events), "n_pulses": place - batch.first_pulse, "n_aux": n_aux,
            "n_cut": int((events["n_pulses"] > events["length"]).sum()), "n_without_light": batch.n_events - len(events),
            "time": time, "charge": charge, "flight_by": flight_by}


# ----------------------------------------------------------------------------------------------------------------------
# the data folder
# ----------------------------------------------------------------------------------------------------------------------

def split_paths(config, split):
    return [Path(config.data_dir) / f"{split}_{kind}.bin" for kind in ("events", "pulses")]


def check_same(data_dir, found, settings):
    for key, value in settings.items():
        if found.get(key) != value:
            fail(f"{data_dir} was prepared with {key} = {found.get(key)}, now it is {value}; set it back, choose another "
                 f"data_dir, or start anew after: rm -r {shlex.quote(str(data_dir))}")


def make_room(data_dir, sizes, more=0):
    """Create the files (path: bytes) at their final size, where they are not there yet -> whether any was created."""
    sizes = {path: size for path, size in sizes.items() if not path.is_file() or path.stat().st_size != size}
    need, free = sum(sizes.values()) + more, shutil.disk_usage(data_dir).free
    free += sum(path.stat().st_blocks * 512 for path in sizes if path.is_file())
    if need > free:
        fail(f"{data_dir}: needs {size_of(need)}, the disk has {size_of(free)} free; make room or choose another data_dir")
    for path, size in sizes.items():
        try:
            reserve(path, size)
        except OSError as error:
            path.unlink(missing_ok=True)
            fail(f"{path}: no room for its {size_of(size)} ({error.strerror}); make room, then the same command goes on")
    return bool(sizes)


def join(config, split, batches, results):
    """Prometheus: put the batches of a split, which were written aside, into its files one after another."""
    events_path, pulses_path = split_paths(config, split)
    n_events, n_pulses = (sum(result[key] for result in results) for key in ("n_events", "n_pulses"))
    make_room(config.data_dir, {events_path: n_events * EVENT.itemsize, pulses_path: n_pulses * PULSE.itemsize})
    event = pulse = 0
    with writing(pulses_path):
        for batch, result in zip(batches, results):
            events = np.fromfile(batch.events_path, EVENT)
            events["start"] += pulse
            write_records(events_path, event, events)
            if result["n_pulses"]:  # an empty file cannot be mapped
                write_records(pulses_path, pulse, np.memmap(batch.pulses_path, PULSE, "r"))
            event, pulse = event + len(events), pulse + result["n_pulses"]
        make_durable(events_path, pulses_path)


def summarize(config, split, results):
    """What meta.json tells of a split."""
    counts = {key: sum(result[key] for result in results)
              for key in ("n_events", "n_pulses", "n_cut", "n_aux", "n_without_light")}
    if counts["n_events"] == 0:
        fail(f"{config.input_dir}: split {split!r} has no event with light; correct splits")
    n_pulses = np.memmap(split_paths(config, split)[0], EVENT, "r")["n_pulses"]  # of the full events
    median, p99 = np.percentile(n_pulses, (50, 99)).tolist()
    return {"batches": config.splits[split], **counts,
            "pulses_median": median, "pulses_p99": p99, "pulses_max": int(n_pulses.max()),
            "time": [min(result["time"][0] for result in results), max(result["time"][1] for result in results)],
            "charge": [min(result["charge"][0] for result in results), max(result["charge"][1] for result in results)],
            "flight_by": dict(Counter(result["flight_by"] for result in results if result["flight_by"]))}


def print_table(meta):
    """Counts and size; pulses of a full event; share of events cut; share of aux, time and charge of the pulses kept."""
    row = "{:<10} {:>12} {:>14} {:>9} {:>9} {:>8} {:>8} {:>6} {:>6}  {:<20} {}"
    print(row.format("split", "events", "pulses", "size", "median n", "99 % n", "max n", "cut", "aux", "time [ns]",
                     "charge [p.e.]"))
    for name, split in meta["splits"].items():
        size = split["n_events"] * EVENT.itemsize + split["n_pulses"] * PULSE.itemsize
        print(row.format(name, f"{split['n_events']:,}", f"{split['n_pulses']:,}", size_of(size),
                         f"{split['pulses_median']:.0f}", f"{split['pulses_p99']:.0f}", split["pulses_max"],
                         f"{split['n_cut'] / split['n_events']:.1%}",
                         f"{split['n_aux'] / split['n_pulses']:.1%}", "{:.6g} to {:.6g}".format(*split["time"]),
                         "{:.4g} to {:.4g}".format(*split["charge"])))
    for name, split in meta["splits"].items():
        if split["n_without_light"]:
            print(f"{name}: {split['n_without_light']:,} events without a photon were left out")
        if split["flight_by"]:
            found = ", ".join(f"{by} ({n} files)" for by, n in split["flight_by"].items())
            print(f"{name}: labels point to the source; which way the files mean their angles was told by: {found}")
        if "convention" in split["flight_by"]:
            print(f"warning: {name}: neither light nor final states told it in {split['flight_by']['convention']} files: "
                  "their angles were taken as those of the flight", file=sys.stderr)


def size_of(n_bytes):
    return f"{n_bytes / 1e9:.1f} GB" if n_bytes >= 1e9 else f"{n_bytes / 1e6:.1f} MB"


# ----------------------------------------------------------------------------------------------------------------------
# main
# ----------------------------------------------------------------------------------------------------------------------

def main():
    config = load_config(PrepareConfig, __doc__)
    data_dir, is_prometheus = Path(config.data_dir), config.source == "prometheus"
    unfinished = data_dir / UNFINISHED
    # the settings that the bytes depend on, as they will be read back
    settings = {"source": config.source, "input_dir": str(Path(config.input_dir).resolve()), "max_pulses": config.max_pulses,
                "seed": config.seed, "merge_window": config.merge_window if is_prometheus else None,
                "splits": {name: batches if batches == "test" else list(batches) for name, batches in config.splits.items()}}
    if (data_dir / "meta.json").exists():
        meta = read_meta(data_dir)
        check_same(data_dir, meta | {"splits": {name: split["batches"] for name, split in meta["splits"].items()}}, settings)
        for split in meta["splits"]:
            open_split(data_dir, split)  # are the files whole?
        shutil.rmtree(unfinished, ignore_errors=True)
        print_table(meta)
        print(f"{data_dir} is complete, nothing to do")
        return

    if data_dir.is_dir() and not unfinished.is_dir() and any(data_dir.iterdir()):
        fail(f"{data_dir} holds files that prepare.py did not write; choose another data_dir")

    # what there is to do: all that can be known before the first pulse is read is checked here
    geometry = read_geometry_csv(Path(config.input_dir) / "sensor_geometry.csv")
    batches = plan_prometheus(config) if is_prometheus else plan_kaggle(config)
    if is_prometheus:
        settings["files"] = [path.name for path in prometheus_files(config)]  # their order gives them their numbers
    sizes = Counter()
    for batch in batches:
        events_path, pulses_path = split_paths(config, batch.split)
        sizes[events_path] += batch.n_events * EVENT.itemsize
        sizes[pulses_path] += batch.n_pulses * PULSE.itemsize

    # take the folder
    lock = hold_lock(unfinished)  # held until main() ends
    print_knobs(config)
    if (unfinished / "settings.json").exists():
        check_same(data_dir, read_json(unfinished / "settings.json"), settings)
    # Prometheus: at most this much aside, then as much in place
    is_new = make_room(data_dir, {}, more=2 * sizes.total()) if is_prometheus else make_room(data_dir, sizes)
    write_json(unfinished / "settings.json", {"command": shlex.join(["python", *sys.argv]), **settings})
    write_atomic(data_dir / "geometry.bin", lambda part: geometry.T.astype("<f4").tofile(part))

    # the batches that are not done yet
    records = [unfinished / f"{batch.split}_{batch.number}.json" for batch in batches]
    if is_new:  # what was noted as done lay in files that are gone
        for path in records:
            path.unlink(missing_ok=True)
    todo = {batch.path: record for batch, record in zip(batches, records) if not record.exists()}
    left = [batch for batch in batches if batch.path in todo]
    n_events, n_left = sum(batch.n_events for batch in batches), sum(batch.n_events for batch in left)
    jobs = ((batch, None) for batch in left) if is_prometheus else kaggle_jobs(config, left)
    workers = max(1, min(config.workers or count_cores(), len(left)))
    with progress_bar(n_events, "prepare", "event", initial=n_events - n_left) as bar:
        run_in_workers(write_batch, ((config, geometry, *job) for job in jobs), workers, bar,
                       lambda job, result: write_json(todo[job[2].path], result))

    # meta.json makes it a finished folder
    splits = {}
    for name in config.splits:
        parts = [(batch, read_json(record)) for batch, record in zip(batches, records) if batch.split == name]
        if is_prometheus:
            join(config, name, *zip(*parts))
        splits[name] = summarize(config, name, [result for _, result in parts])
    meta = {"format": FORMAT_VERSION, **settings, "n_doms": N_DOMS, "dtypes": describe_dtypes(), "splits": splits}
    write_json(data_dir / "meta.json", meta)
    shutil.rmtree(unfinished)
    print_table(meta)


if __name__ == "__main__":
    run_stage(main)
