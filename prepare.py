"""Stage 1: event files in the Kaggle layout -> a data folder of .bin files that train.py maps into memory.

    python prepare.py sample_config/demo_prepare.py          # what simulate.py wrote, seconds
    python prepare.py config/kaggle_prepare.py --workers=16  # the paper's splits: 102 M events, 81 GB
    python prepare.py sample_config/prometheus_prepare.py    # what tools/prometheus.py made of photon files

Prints one bar over the events, then a table of what each split holds, so that a wrong input is seen at once.
A run that was stopped, in whatever way, goes on with the same command. The bytes are the same for any number
of workers.

Plan, read, rule, write. The plan: how many pulses an event keeps follows from its length alone. So the meta
table fixes the place of every event before the first pulse is read, the files get their final size at once,
each worker writes its own slice, and nothing is merged at the end.

The rule (upstream's): an event keeps all its pulses if they are at most max_pulses. Else all its good ones
(aux = False, in local coincidence) and random others; or, if the good ones alone are too many, a random
max_pulses of those. The time order stays. Total charge, centre and motion are those of the full event.
With keep = "brightest", a too long event keeps first of all the earliest good pulse of each DOM, that of the
DOM with most charge first. A kept pulse then has the charge of all good ones up to the DOM's next kept one.
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

from common import (check_settings, count_cores, count_events, fail, hold_lock, progress_bar, read_json,
                    run_in_workers, run_stage, write_atomic, write_json)
from data import (EVENT, FORMAT_VERSION, GEOMETRY, PULSE, UNFINISHED, describe_dtypes, open_split, read_meta,
                  uniform_ranges)
from knobs import check_choice, check_not_negative, load_config, print_knobs
from tables import (CHUNK, MAX_DOMS, MAX_FLOAT, open_parquet, read_batches, read_detector, refuse,
                    refuse_outside, to_numpy)


@dataclass
class PrepareConfig:
    input_dir: str = "data/kaggle"  # holds sensor_geometry.csv and train/, train_meta.parquet, ...
    data_dir: str = "data/icecube"  # the data folder to write
    splits: dict = field(default_factory=lambda: {  # name: (first, last) batch, both included; or "test"
        "pretrain": (1, 500), "finetune": (601, 605), "val": (651, 655)})
    max_pulses: int = 127  # pulses kept of an event: 128 positions with [CLS]
    keep: str = "paper"  # of too many pulses: random good ones, or "brightest": one per DOM with its charge
    seed: int = 0  # of the random choice among too many pulses
    workers: int = 0  # processes, each with a batch file of its own and 0.3 GB of memory; 0 = one per core

    def check(self):
        yield from check_not_negative(self, "seed", "workers")
        if not 1 <= self.max_pulses <= 65535:
            yield f"max_pulses = {self.max_pulses}: must lie between 1 and 65535"
        yield from check_choice(self, "keep", ("paper", "brightest"))
        if not self.splits:
            yield "splits is empty: nothing to prepare"
        for name, batches in self.splits.items():
            is_pair = isinstance(batches, (tuple, list)) and [type(n) for n in batches] == [int, int]
            if not (isinstance(name, str) and name.isidentifier()):
                yield f"splits: {name!r} cannot be the name of a file; use letters, digits and _"
            elif not (batches == "test" or is_pair and 0 <= batches[0] <= batches[1]):
                yield f"splits: {name!r} = {batches!r}: write (first, last) batch, or 'test'"
        for (a, x), (b, y) in combinations(self.splits.items(), 2):
            if x == y == "test" or "test" not in (x, y) and max(x[0], y[0]) <= min(x[1], y[1]):
                what = "the test set" if x == "test" else f"batch {max(x[0], y[0])}"
                yield f"splits: {what} is in {a!r} and in {b!r}; an event may be in one split only"


# ------------------------------------------------------------------------------
# plan: which batches there are, and where each goes
# ------------------------------------------------------------------------------

@dataclass
class Batch:
    """One file of events, and where it goes."""
    split: str
    number: int
    path: Path
    n_events: int  # any number  # DIFF(upstream): there the last batch, of 153,924 events, fails
    n_pulses: int  # to keep
    first_event: int = 0  # place in <split>_events.bin
    first_pulse: int = 0  # place in <split>_pulses.bin


def plan_kaggle(config):
    """Find the batches of all splits, check them against the meta tables, place them -> list of Batch."""
    folder = Path(config.input_dir)
    split_of = {number: name for name, batches in config.splits.items() if batches != "test"
                for number in range(batches[0], batches[1] + 1)}
    test_split = next((name for name, batches in config.splits.items() if batches == "test"), None)
    batches = []
    for kind in [kind for kind, wanted in (("train", split_of), ("test", test_split)) if wanted]:
        meta = folder / f"{kind}_meta.parquet"
        for number, row, events in kaggle_meta(meta, split_of if kind == "train" else None):
            path = folder / kind / f"batch_{number}.parquet"
            n_rows = open_parquet(path, KAGGLE_PULSES)[0].metadata.num_rows
            end = events["start"] + events["n_pulses"]
            refuse(end > n_rows, meta, row,
                   lambda i: f"event {events['event_id'][i]} of batch {number} ends at pulse {end[i] - 1}, "
                             f"but {path} has {n_rows} rows; get both files anew")
            split = split_of[number] if kind == "train" else test_split
            n_kept = int(np.minimum(events["n_pulses"], config.max_pulses).sum(dtype=np.int64))
            batches.append(Batch(split, number, path, len(events), n_kept))
        missing = sorted(split_of.keys() - {batch.number for batch in batches})
        if missing:
            numbers = ", ".join(map(str, missing[:8])) + (", ..." if len(missing) > 8 else "")
            fail(f"{meta}: has no batch {numbers}, which split {split_of[missing[0]]!r} asks for; correct "
                 "splits or input_dir")
        if kind == "test" and test_split not in [batch.split for batch in batches]:
            fail(f"{meta}: has no events, which split {test_split!r} asks for; correct splits or input_dir")
    batches.sort(key=lambda batch: (list(config.splits).index(batch.split), batch.number))
    for before, batch in zip(batches[:-1], batches[1:]):
        if before.split == batch.split:
            batch.first_event = before.first_event + before.n_events
            batch.first_pulse = before.first_pulse + before.n_pulses
    return batches


def kaggle_jobs(config, batches):
    """Yield (Batch, EVENT records) from the meta tables once more: all records at once would be 5 GB."""
    for kind in ("train", "test"):
        todo = {batch.number: batch for batch in batches
                if (config.splits[batch.split] == "test") == (kind == "test")}
        meta = Path(config.input_dir) / f"{kind}_meta.parquet"
        for number, _, events in kaggle_meta(meta, todo if kind == "train" else None) if todo else ():
            if number in todo:
                yield todo[number], events


def split_paths(config, split):
    return [Path(config.data_dir) / f"{split}_{kind}.bin" for kind in ("events", "pulses")]


# ------------------------------------------------------------------------------
# read: the meta table batch by batch, the pulses in chunks of whole events
# ------------------------------------------------------------------------------

KAGGLE_PULSES = {"time": "number", "charge": "number", "sensor_id": "integer", "auxiliary": "boolean",
                 "event_id": "integer"}
KAGGLE_META = {"batch_id": "integer", "event_id": "integer", "first_pulse_index": "integer",
               "last_pulse_index": "integer"}
KAGGLE_LABELS = {"azimuth": "number", "zenith": "number"}
KAGGLE_EXTRA = {"energy": "number", "event_class": "integer"}  # simulate.py writes them, Kaggle does not


def kaggle_meta(path, wanted):
    """Yield (number, row, EVENT records) of the wanted batches of a meta table; None = all, without labels.

    row is where the batch begins in the table; `start` is the event's first row in the batch file, for the
    time being. The table has 132 M rows: it is streamed, one batch at a time is in memory.
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
                    fail(f"{path}: row {first_row}: the rows of batch {number} are not together; sort "
                         "the table by batch_id")
                seen.add(number)
            if wanted is None or number in wanted:
                pieces.append({name: values[a:b] for name, values in table.items()})
    if pieces:
        yield number, first_row, kaggle_events(path, first_row, pieces)


def kaggle_events(path, row, pieces):
    """The rows of one batch in the meta table, the first of them row `row` -> EVENT records."""
    table = {name: np.concatenate([piece[name] for piece in pieces]) for name in pieces[0]}
    first, last = (table[f"{end}_pulse_index"].astype(np.int64) for end in ("first", "last"))

    def name(i):
        return f"event {table['event_id'][i]} of batch {table['batch_id'][i]}"
    refuse((first < 0) | (last < first), path, row,
           lambda i: f"{name(i)} has the pulses {first[i]} to {last[i]}, reversed or negative; get it anew")
    refuse(np.append(False, first[1:] <= last[:-1]), path, row,
           lambda i: f"{name(i)} begins at pulse {first[i]}, the event before it ends at {last[i - 1]}: they "
                     "overlap or are out of order; get the table anew")
    events = np.zeros(len(first), EVENT)
    events["event_id"], events["start"], events["n_pulses"] = table["event_id"], first, last - first + 1
    for label in ("azimuth", "zenith", "energy"):
        events[label] = table.get(label, np.nan)
    events["event_class"] = event_class = table.get("event_class", np.zeros(len(first), np.int64))
    refuse(events["energy"] <= 0, path, row,
           lambda i: f"{name(i)} has energy {events['energy'][i]:g}; it must be above 0 GeV, or missing")
    refuse((event_class < 0) | (event_class > 2), path, row,
           lambda i: f"{name(i)} has event_class {event_class[i]}; 0 is unknown, 1 a track, 2 a cascade")
    if "azimuth" in table:
        azimuth, zenith = table["azimuth"], table["zenith"]
        refuse(~((np.abs(azimuth) <= 6.2832) & (zenith >= 0) & (zenith <= 3.1416)), path, row,
               lambda i: f"{name(i)} has azimuth {azimuth[i]}, zenith {zenith[i]}; a labelled split needs "
                         "angles in radians")
    return events


def kaggle_chunks(path, events, n_doms):
    """Yield some thousand events at a time with all their pulses: events, time, charge, dom, aux."""
    file, columns = open_parquet(path, KAGGLE_PULSES)
    first, end = events["start"].copy(), events["start"] + events["n_pulses"]

    def chunk(a, b, table, row):
        """Events a to b, whose pulses are all in this table; its first row is row `row` of the file."""
        n, rows = end[a:b] - first[a:b], slice(first[a] - row, end[b - 1] - row)
        if n.sum() < end[b - 1] - first[a]:  # some pulses belong to no event
            rows = np.arange(n.sum()) + np.repeat(first[a:b] - row - np.cumsum(n) + n, n)
        time, charge, dom, aux, event_id = (table[name][rows] for name in KAGGLE_PULSES)
        # every pulse is asked for its event: decoding event_id takes 1/10 of the time of the other columns
        owner = np.repeat(events["event_id"][a:b], n)
        if (event_id != owner).any():
            i = int(np.argmax(event_id != owner))
            fail(f"{path}: row {row + np.arange(end[b - 1] - row)[rows][i]}: event_id is {event_id[i]}, the "
                 f"meta table has {owner[i]} there; the two files do not belong together, get both anew")
        return events[a:b], time, charge, dom, aux

    done, broken = 0, None  # events given out; the pulses so far of the event that goes on in the next table
    for row, table in read_batches(file, path, columns, CHUNK):
        table = {name: to_numpy(table.column(name), path, row, name) for name in columns}
        for name, high in (("time", MAX_FLOAT), ("charge", MAX_FLOAT), ("sensor_id", n_doms - 1)):
            refuse_outside(table[name], 0, high, path, row, name)
        n_read = row + len(table["time"])
        if broken:
            rest = end[done] - row
            broken = {name: np.append(values, table[name][:rest]) for name, values in broken.items()}
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


# ------------------------------------------------------------------------------
# rule: which pulses an event keeps
# ------------------------------------------------------------------------------

def pack(events, time, charge, dom, aux, detector, config):
    """Whole events -> the PULSE records they keep, one event after another; completes `events` in place.

    events: EVENT records with n_pulses set; time, charge, dom, aux: all their pulses, event after event.
    """
    n = events["n_pulses"].astype(np.int64)
    offset = np.cumsum(n) - n
    goes_back = time[1:] < time[:-1]
    goes_back[offset[1:] - 1] = False  # from one event to the next it may
    if goes_back.any():
        order = np.lexsort((time, np.repeat(np.arange(len(n)), n)))  # stable: ties stay as in the file
        time, charge, dom, aux = time[order], charge[order], dom[order], aux[order]

    # motion: position = r + v time is fitted to the good pulses, weighted by charge; -v is a first guess of
    # where the neutrino came from (astro-ph/0407044, section 3.1.3). v is sum(charge * position * lever), but
    # for a factor; with fewer than two times or two DOMs nothing but rounding is left of it
    charge = charge.astype(np.float64, copy=False)
    weight = charge * ~aux
    total, good_total = np.add.reduceat(charge, offset), np.add.reduceat(weight, offset)
    mean_time = np.add.reduceat(weight * time, offset) / np.where(good_total > 0, good_total, 1)
    lever = (time - np.repeat(mean_time, n)) * ~aux
    v = np.empty((len(n), 3))
    place = dom.astype(np.intp)  # as take wants it, converted once for the three; "clip" spares a check
    for axis in range(3):
        moment = charge * detector.position[axis].take(place, mode="clip")
        events["center"][:, axis] = np.add.reduceat(moment, offset) / np.where(total > 0, total, 1)
        v[:, axis] = np.add.reduceat(moment * lever, offset)
    speed = np.linalg.norm(v, axis=1)
    can_fit = speed > 1e-6 * good_total  # [m ns]; rounding makes 1e-8, neighbours 1 ns apart 6e-5
    events["motion"] = np.where(can_fit[:, None], -v / np.where(can_fit, speed, 1)[:, None], 0)
    events["total_charge"] = total
    events["length"] = np.minimum(n, config.max_pulses)

    keep = slice(None)
    is_long = n > config.max_pulses
    if is_long.any():
        # a draw for each pulse, good ones before all others; an event keeps its max_pulses smallest
        # DIFF(upstream): a hash of event and pulse, so that no order of batches or workers can change it
        in_long, n_long = np.repeat(is_long, n), n[is_long]
        draw = uniform_ranges(config.seed, events["event_id"][is_long], n_long)
        draw += aux[in_long]
        if config.keep == "brightest":  # before all others: each DOM's first, in order of the DOMs' charge
            order, first = sort_by_dom(np.repeat(np.arange(len(n_long)), n_long), place[in_long],
                                       aux[in_long])
            summed = charge[in_long]
            draw[order[first]] *= 1e-3  # decides between DOMs of equal charge
            draw[order[first]] -= np.add.reduceat(summed[order], first)
        begin, ordered = np.cumsum(n_long) - n_long, draw.copy()
        for a, b in zip(begin.tolist(), (begin + n_long).tolist()):
            ordered[a:b].partition(config.max_pulses - 1)
        keep = ~in_long
        keep[in_long] = draw <= np.repeat(ordered[begin + config.max_pulses - 1], n_long)
        if config.keep == "brightest":  # the charge of what is dropped goes to the one kept before it
            begins = keep[in_long][order]
            begins[first] = True  # that of a whole DOM to none
            begins = np.flatnonzero(begins)
            summed[order[begins]] = np.add.reduceat(summed[order], begins)
            charge = charge.copy()
            charge[in_long] = summed
        keep = np.flatnonzero(keep)  # once, for four columns

    pulses = np.empty(events["length"].sum(dtype=np.int64), PULSE)  # equal draws, once in 10^9 batches, raise
    for name, values in (("time", time), ("charge", charge), ("dom", dom), ("aux", aux)):
        pulses[name] = values[keep]
    return pulses


def sort_by_dom(event, dom, aux):
    """Good pulses in order of time -> their indices by event, DOM and time; where in these a DOM begins."""
    good = np.flatnonzero(~aux)
    channel = event[good] * (MAX_DOMS + 1) + dom[good]
    order = np.argsort(channel, kind="stable")
    return good[order], np.flatnonzero(np.diff(channel[order], prepend=-1))


# ------------------------------------------------------------------------------
# write: the slice of each batch, in a worker; then what meta.json tells
# ------------------------------------------------------------------------------

def reserve(path, n_bytes):
    """Create a file of its final size, with its room on the disk taken (OSError if there is none)."""
    with open(path, "wb") as file:
        if hasattr(os, "posix_fallocate") and n_bytes:
            os.posix_fallocate(file.fileno(), 0, n_bytes)
        file.truncate(n_bytes)


def write_records(path, first, records):
    """Write PULSE or EVENT records to a reserved file from record `first` on; many processes may at once."""
    with open(path, "r+b") as file:
        file.seek(first * records.dtype.itemsize)
        file.write(np.ascontiguousarray(records).data.cast("B") if len(records) else b"")


@contextmanager
def writing(path):
    """Turn a full disk and the like into one line."""
    try:
        yield
    except OSError as error:
        fail(f"{error.filename or path}: cannot be written ({error.strerror}); correct that, the same "
             "command goes on")


def write_batch(config, detector, batch, events):
    """Write the slice of one batch -> what meta.json and the table at the end need to know of it."""
    pa.set_cpu_count(1)
    events_path, pulses_path = split_paths(config, batch.split)
    place, n_aux, time, charge = batch.first_pulse, 0, [math.inf, 0.0], [math.inf, 0.0]
    with writing(pulses_path):
        # part: a view of some of the events
        for part, *columns in kaggle_chunks(batch.path, events, len(detector)):
            pulses = pack(part, *columns, detector, config)
            total = part["total_charge"]  # a pulse without charge does no harm, but here log10 is asked for
            if total.min() <= 0:
                fail(f"{batch.path}: event {part['event_id'][np.argmin(total)]} has no charge; get it anew")
            part["start"] = place + np.cumsum(part["length"], dtype=np.int64) - part["length"]
            write_records(pulses_path, place, pulses)
            place += len(pulses)
            count_events(len(part))
            n_aux += int(np.count_nonzero(pulses["aux"]))
            for span, values in ((time, pulses["time"]), (charge, pulses["charge"])):
                span[:] = min(span[0], float(values.min())), max(span[1], float(values.max()))
        write_records(events_path, batch.first_event, events)
        for path in (events_path, pulses_path):  # on disk before the main process notes this batch as done
            with open(path, "rb") as file:
                os.fsync(file.fileno())
    return {"n_events": len(events), "n_pulses": place - batch.first_pulse, "n_aux": n_aux,
            "n_cut": int((events["n_pulses"] > events["length"]).sum()), "time": time, "charge": charge}


def make_room(data_dir, sizes, records):
    """Create those of the files (path: bytes) at their final size that are not there.

    If any is not, the records of what is done go first: they may be of files that are gone.
    """
    sizes = {path: size for path, size in sizes.items() if not path.is_file() or path.stat().st_size != size}
    for path in records if sizes else ():
        path.unlink(missing_ok=True)
    need, free = sum(sizes.values()), shutil.disk_usage(data_dir).free
    free += sum(path.stat().st_blocks * 512 for path in sizes if path.is_file())
    if need > free:
        fail(f"{data_dir}: needs {size_of(need)}, the disk has {size_of(free)} free; make room or choose "
             "another data_dir")
    for path, size in sizes.items():
        try:
            reserve(path, size)
        except OSError as error:
            path.unlink(missing_ok=True)
            fail(f"{path}: no room for its {size_of(size)} ({error.strerror}); make room, then the same "
                 "command goes on")


def summarize(config, split, results):
    """What meta.json tells of a split."""
    counts = {key: sum(result[key] for result in results)
              for key in ("n_events", "n_pulses", "n_cut", "n_aux")}
    n_pulses = np.memmap(split_paths(config, split)[0], EVENT, "r")["n_pulses"]  # of the full events
    median, p99 = np.percentile(n_pulses, (50, 99)).tolist()
    spans = {name: [min(result[name][0] for result in results), max(result[name][1] for result in results)]
             for name in ("time", "charge")}
    return {"batches": config.splits[split], **counts, "pulses_median": median, "pulses_p99": p99,
            "pulses_max": int(n_pulses.max()), **spans}


def print_table(meta):
    """Counts, size; pulses of a full event; share of events cut; of the pulses kept: aux, time, charge."""
    row = "{:<10} {:>12} {:>14} {:>9} {:>9} {:>8} {:>8} {:>6} {:>6}  {:<20} {}"
    print(row.format("split", "events", "pulses", "size", "median n", "99 % n", "max n", "cut", "aux",
                     "time [ns]", "charge [p.e.]"))
    for name, split in meta["splits"].items():
        n_events, n_pulses, time, charge = (split[key] for key in ("n_events", "n_pulses", "time", "charge"))
        size = size_of(n_events * EVENT.itemsize + n_pulses * PULSE.itemsize)
        print(row.format(name, f"{n_events:,}", f"{n_pulses:,}", size, f"{split['pulses_median']:.0f}",
                         f"{split['pulses_p99']:.0f}", split["pulses_max"],
                         f"{split['n_cut'] / n_events:.1%}", f"{split['n_aux'] / n_pulses:.1%}",
                         f"{time[0]:.6g} to {time[1]:.6g}", f"{charge[0]:.4g} to {charge[1]:.4g}"))


def size_of(n_bytes):
    return f"{n_bytes / 1e9:.1f} GB" if n_bytes >= 1e9 else f"{n_bytes / 1e6:.1f} MB"


# ------------------------------------------------------------------------------
# main
# ------------------------------------------------------------------------------

def main():
    config = load_config(PrepareConfig, __doc__)
    data_dir = Path(config.data_dir)
    unfinished = data_dir / UNFINISHED
    # the settings that the bytes depend on, as they will be read back
    settings = {"source": "kaggle", "input_dir": str(Path(config.input_dir).resolve()),
                "max_pulses": config.max_pulses, "keep": config.keep, "seed": config.seed,
                "splits": {name: batches if batches == "test" else list(batches)
                           for name, batches in config.splits.items()}}
    if (data_dir / "meta.json").exists():
        meta = read_meta(data_dir)
        found_splits = {name: split["batches"] for name, split in meta["splits"].items()}
        check_settings(data_dir, meta | {"splits": found_splits}, settings, "data_dir")
        for split in meta["splits"]:
            open_split(data_dir, split)  # are the files whole?
        shutil.rmtree(unfinished, ignore_errors=True)
        print_table(meta)
        print(f"{data_dir} is complete, nothing to do")
        source = Path(config.input_dir) / "train_meta.parquet"
        if source.exists() and source.stat().st_mtime > (data_dir / "meta.json").stat().st_mtime:
            print(f"note: {source} is younger than {data_dir}; remove that folder to prepare it anew")
        return

    if data_dir.is_dir() and not unfinished.is_dir() and any(data_dir.iterdir()):
        fail(f"{data_dir} holds files that prepare.py did not write; choose another data_dir")

    # plan: all that can be known before the first pulse is read is checked here
    detector = read_detector(Path(config.input_dir) / "sensor_geometry.csv")
    batches = plan_kaggle(config)
    sizes = Counter()
    for batch in batches:
        events_path, pulses_path = split_paths(config, batch.split)
        sizes[events_path] += batch.n_events * EVENT.itemsize
        sizes[pulses_path] += batch.n_pulses * PULSE.itemsize

    # take the folder
    lock = hold_lock(unfinished)  # held until main() ends
    if (data_dir / "meta.json").exists():
        fail(f"{data_dir}: another run has finished it meanwhile; the same command shows what it holds")
    print_knobs(config)
    if (unfinished / "settings.json").exists():
        check_settings(data_dir, read_json(unfinished / "settings.json"), settings, "data_dir")
    records = [unfinished / f"{batch.split}_{batch.number}.json" for batch in batches]
    geometry, geometry_path = np.zeros(len(detector), GEOMETRY), data_dir / "geometry.bin"
    geometry["position"], geometry["string"] = detector.position.T, detector.string
    if geometry_path.exists() and geometry_path.read_bytes() != geometry.tobytes():
        for record in records:  # centres and motions of what is done are of other places
            record.unlink(missing_ok=True)
    make_room(data_dir, sizes, records)
    write_json(unfinished / "settings.json", {"command": shlex.join(["python", *sys.argv]), **settings})
    write_atomic(geometry_path, geometry.tofile)

    # read, rule, write: the batches that are not done yet
    todo = {batch.path: record for batch, record in zip(batches, records) if not record.exists()}
    left = [batch for batch in batches if batch.path in todo]
    n_events, n_left = sum(batch.n_events for batch in batches), sum(batch.n_events for batch in left)
    jobs = ((config, detector, *job) for job in kaggle_jobs(config, left))
    workers = max(1, min(config.workers or count_cores(), len(left)))
    with progress_bar(n_events, "prepare", "event", initial=n_events - n_left) as bar:
        run_in_workers(write_batch, jobs, workers, bar,
                       lambda job, result: write_json(todo[job[2].path], result))

    # meta.json makes it a finished folder
    splits = {}
    for name in config.splits:
        results = [read_json(record) for batch, record in zip(batches, records) if batch.split == name]
        splits[name] = summarize(config, name, results)
    meta = {"format": FORMAT_VERSION, **settings, "n_doms": len(detector), "dtypes": describe_dtypes()}
    meta["splits"] = splits
    write_json(data_dir / "meta.json", meta)
    shutil.rmtree(unfinished, ignore_errors=True)  # network disks keep a lock that is open
    print_table(meta)


if __name__ == "__main__":
    run_stage(main)
