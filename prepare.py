"""Stage 1: events in the Kaggle layout -> a data folder of .bin files.

    python prepare.py sample_config/demo_prepare.py          # seconds
    python prepare.py config/kaggle_prepare.py --workers=16  # 102 M events, 81 GB

Prints what each split holds. The same command resumes. Workers do not change the bytes.
"""
import json
import os
import shutil
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

import data
import utils
from data import EVENT, PULSE
from utils import fail

@dataclass
class PrepareConfig:
    input_dir: str = "data/kaggle"  # in the Kaggle layout
    data_dir: str = "data/icecube"  # folder to write
    splits: dict = field(default_factory=lambda: {  # (first, last) batch, or "test"
        "pretrain": (1, 500), "finetune": (601, 605), "val": (651, 655)})
    max_pulses: int = 127  # pulses kept of an event: 128 tokens with [CLS]
    keep: Literal["random", "brightest"] = "random"  # which of too many pulses
    seed: int = 0  # of the random choice
    workers: int = 0  # processes, 0.3 GB each; 0 = one per core

    def check(self):
        if not 0 < self.max_pulses < 2**16:
            fail(f"max_pulses = {self.max_pulses}: must be 1 to 65535")
        assign_batches(self.splits)

def assign_batches(splits) -> dict:
    """Return {batch: split}; all batches of the test set are "test"."""
    split_of = {}
    for name, span in splits.items():
        is_pair = isinstance(span, (tuple, list)) and {*map(type, span)} == {int}
        numbers = range(span[0], span[-1] + 1) if is_pair else ["test"] * (span == "test")
        if not name.isidentifier() or not numbers or split_of.keys() & set(numbers):
            fail(f"splits: {name!r}: {span!r}: write name: (first, last) batch or name: "
                 "'test', each batch once")
        split_of |= dict.fromkeys(numbers, name)
    return split_of

# ---- read ---------------------------------------------------------------------------------------

# rows at a time: arrays of 0.5 MB stay in the cache, a meta table has 132 M rows
CHUNK = 2**16
PULSES = ["time", "charge", "sensor_id", "auxiliary", "event_id"]
META = ["batch_id", "event_id", "first_pulse_index", "last_pulse_index"]
LABELS = ["azimuth", "zenith"]
EXTRA = ["energy", "event_class"]  # not in Kaggle's files
TYPES = dict.fromkeys(["time", "charge", "energy", *LABELS], "f8") | {"auxiliary": "?"}

def read_columns(path, names, optional=()):
    """Yield (row, {name: array}) of a parquet file, CHUNK rows from `row` on."""
    row, name = 0, "file"
    try:
        # by default pyarrow keeps what was read, 9 GB of train_meta.parquet
        file = pq.ParquetFile(path, buffer_size=2**20, pre_buffer=False)
        names = names + [x for x in optional if x in file.schema_arrow.names]
        for batch in file.iter_batches(CHUNK, columns=names, use_threads=False):
            table = {}
            for name in names:
                column, kind = batch[name], TYPES.get(name, "i8")
                if column.null_count:
                    fail(f"{path}: {name} has no value in some row after {row}")
                values = column.to_numpy(zero_copy_only=False)
                table[name] = values.astype(kind, casting="same_kind", copy=False)
            yield row, table
            row += len(batch)
    except (pa.ArrowException, OSError, KeyError, TypeError) as error:
        fail(f"{path}: {name} cannot be read after row {row}: {str(error).splitlines()[0]}")

def table_to_events(path, row, table, before):
    """Turn rows of a meta table into EVENT records; before: batch_id, last pulse."""
    batch_id, _, first, last = (table[name] for name in META)
    events = np.zeros(len(first), EVENT)
    for name in EVENT.names:
        if EVENT[name].base.kind == "f":  # labels may stay unknown, sums may not
            events[name] = np.nan
    for name in table.keys() & set(EVENT.names):
        events[name] = table[name]
    events["n_pulses"] = last - first + 1
    step = np.diff(batch_id, prepend=before[0])
    begin = np.where(step > 0, 0, np.append(before[1], last[:-1]) + 1)
    azimuth, zenith = (table.get(name, 0 * first) for name in LABELS)
    required = {
        "sort the table by batch_id": step >= 0,
        "pulses must follow the event before": (first == begin) & (last >= first),
        "azimuth must be in radians": np.abs(azimuth) <= 6.2832,
        "zenith must be in radians": (zenith >= 0) & (zenith <= 3.1416),
        "energy must be above 0 GeV, or NaN": ~(events["energy"] <= 0),
        "event_class must be 0, 1 or 2": np.isin(table.get("event_class", 0), (0, 1, 2))}
    for text, is_good in required.items():
        if not is_good.all():
            i = np.argmin(is_good)
            values = ", ".join(f"{name} {column[i]}" for name, column in table.items())
            fail(f"{path}: row {row + i}: {text}; it has {values}")
    return events

def read_pulses(path, events, n_doms):
    """Yield (events, time, charge, dom, aux) of some whole events."""
    # float32 holds whole numbers exactly up to 2^24 [ns]
    limits = {"time": 2**24, "charge": np.finfo("f4").max, "sensor_id": n_doms - 1}
    end = np.cumsum(events["n_pulses"], dtype="i8")
    done, rest = 0, [np.zeros(0, bool)] * 5  # of an incomplete event
    for row, table in read_columns(path, PULSES):
        for name, high in limits.items():
            is_good = (table[name] >= 0) & (table[name] <= high)  # NaN is not
            if not is_good.all():
                i = np.argmin(is_good)
                fail(f"{path}: row {row + i}: {name} is {table[name][i]}, not 0 to {high}")
        columns = [np.append(old, table[name]) for old, name in zip(rest, PULSES)]
        ready = int(np.searchsorted(end, row + len(table["time"]), side="right"))
        part = events[done:ready]
        owner = np.repeat(part["event_id"], part["n_pulses"])
        if (columns[-1][:len(owner)] != owner).any():
            fail(f"{path}: near row {row}: event_id is not the meta table's")
        if len(part):
            yield part, *[column[:len(owner)] for column in columns[:-1]]
        done, rest = ready, [column[len(owner):] for column in columns]
    if done < len(events) or len(rest[0]):
        fail(f"{path}: has not the {end[-1]} rows of the meta table")

# ---- rule: which pulses an event keeps ----------------------------------------------------------
# The rule (upstream's): of more than max_pulses pulses an event keeps its HLC pulses (aux = False)
# and random others; if the HLC pulses alone are too many, a random max_pulses of them.
# keep = "brightest": first the earliest HLC pulse of each DOM, that of the DOM with most charge
# first. A kept pulse gets the charge of the DOM's HLC pulses up to its next kept one.

def pack(events, time, charge, dom, aux, detector, config):
    """Apply the rule to whole events -> the PULSE records they keep.

    Fills in sums and length of events (B,). time, charge, dom, aux: all their pulses,
    event after event. detector: position (V, 3) [m], string (V,).
    """
    n = events["n_pulses"].astype("i8")
    begin, event = np.cumsum(n) - n, np.repeat(np.arange(len(n)), n)
    if ((time[1:] < time[:-1]) & (event[1:] == event[:-1])).any():
        order = np.lexsort((time, event))  # stable: ties stay
        time, charge, dom, aux = time[order], charge[order], dom[order], aux[order]
    add_sums(events, n, begin, time, charge, dom, aux, detector)
    events["length"] = np.minimum(n, config.max_pulses)
    # each pulse draws a number, HLC pulses below all others; an event keeps its smallest
    # DIFF(upstream): a hash of event and pulse, so the order of batches changes nothing
    place = np.arange(len(event)) - np.repeat(begin, n)
    draw = data.uniform_hash(config.seed, events["event_id"], place, n)
    draw += aux
    # below those each DOM's first HLC pulse, in order of the DOM's charge
    if config.keep == "brightest":
        hlc = np.flatnonzero(~aux)
        channel = event[hlc] * (data.MAX_DOMS + 1) + dom[hlc]
        order = np.argsort(channel, kind="stable")
        hlc, is_first = hlc[order], np.diff(channel[order], prepend=-1) > 0
        draw[hlc[is_first]] *= 1e-3  # decides between DOMs of equal charge
        draw[hlc[is_first]] -= np.add.reduceat(charge[hlc], np.flatnonzero(is_first))
    # slow form, per event: keep = draw <= np.sort(draw)[max_pulses - 1]
    last, limit = config.max_pulses - 1, np.full(len(n), np.inf)
    for i in np.flatnonzero(n > config.max_pulses).tolist():
        limit[i] = np.partition(draw[begin[i]:begin[i] + n[i]], last)[last]
    keep = draw <= np.repeat(limit, n)
    # charge of dropped pulses goes to the DOM's kept one before
    if config.keep == "brightest":
        takes = np.flatnonzero(keep[hlc] | is_first)
        charge = charge.copy()
        charge[hlc[takes]] = np.add.reduceat(charge[hlc], takes)
    keep = np.flatnonzero(keep)
    pulses = np.empty(events["length"].sum(dtype="i8"), PULSE)
    for name, values in zip(PULSE.names, (time, charge, dom, aux)):
        pulses[name] = values[keep]  # raises at equal draws
    return pulses

def add_sums(events, n, begin, time, charge, dom, aux, detector):
    """Fill in total_charge, center and line_fit of events of n (B,) pulses.

    The line r + v time is fitted to the HLC pulses, weighted by charge; -v is a first
    guess of the source (astro-ph/0407044, section 3.1.3). Slow form, HLC pulses:
        mean_time = np.average(time, weights=charge)
        v = sum(charge * position[dom].T * (time - mean_time))  # summed over pulses
    """
    position, _ = detector
    # slow form of reduceat: [part.sum() for part in np.split(charge, begin[1:])]
    weight = charge * ~aux
    total, hlc_total = np.add.reduceat(charge, begin), np.add.reduceat(weight, begin)
    events["total_charge"] = total
    total[total == 0], hlc_total[hlc_total == 0] = 1, 1
    mean_time = np.add.reduceat(weight * time, begin) / hlc_total
    lever = (time - np.repeat(mean_time, n)) * ~aux
    v = np.empty((len(n), 3))
    for axis in range(3):
        # slow form of take: position[dom, axis]
        moment = charge * position[:, axis].take(dom, mode="clip")
        events["center"][:, axis] = np.add.reduceat(moment, begin) / total
        v[:, axis] = np.add.reduceat(moment * lever, begin)
    speed = np.linalg.norm(v, axis=1, keepdims=True)
    # [m ns] of one time or one DOM, rounding makes 1e-8; neighbours 1 ns apart 6e-5
    can_fit = speed > 1e-6 * hlc_total[:, None]
    events["line_fit"] = np.where(can_fit, -v / np.where(can_fit, speed, 1), 0)

# ---- plan, write, main --------------------------------------------------------------------------

def plan(config):
    """Give each batch its place -> dicts. Write EVENT records, empty pulses."""
    for marker in Path(config.data_dir).glob("unfinished/*.json"):
        marker.unlink()
    split_of, batches = assign_batches(config.splits), {}
    place = {split: np.zeros(2, "i8") for split in config.splits}  # events, pulses
    for kind in sorted({"test" if key == "test" else "train" for key in split_of}):
        path, before = f"{config.input_dir}/{kind}_meta.parquet", (-1, -1)
        for row, table in read_columns(path, META + LABELS * (kind == "train"), EXTRA):
            events = table_to_events(path, row, table, before)
            before = table["batch_id"][-1], table["last_pulse_index"][-1]
            for number in np.unique(table["batch_id"]).tolist():
                key = number if kind == "train" else "test"
                if key not in split_of:
                    continue
                split, part = split_of[key], events[table["batch_id"] == number]
                # DIFF(upstream): a batch of 153,924 events, the last one, fails
                batch = batches.setdefault((key, number), {
                    "split": split, "number": number, "n_events": 0,
                    "path": f"{config.input_dir}/{kind}/batch_{number}.parquet",
                    "place": place[split].tolist()})
                batch["n_events"] += len(part)
                mode = "ab" if place[split][0] else "wb"
                with open(f"{config.data_dir}/{split}_events.bin", mode) as file:
                    file.write(part.tobytes())
                n_kept = np.minimum(part["n_pulses"], config.max_pulses).sum(dtype="i8")
                place[split] += len(part), n_kept
    missing = split_of.keys() - {key for key, _ in batches}
    if missing:
        fail(f"{config.input_dir}: no batch {sorted(map(str, missing))[:8]} in the meta tables")
    for split, (_, n_pulses) in place.items():
        with open(f"{config.data_dir}/{split}_pulses.bin", "wb") as file:
            file.truncate(n_pulses * PULSE.itemsize)
    return list(batches.values())

def stamp(*paths):
    """Return sizes and times of change of files."""
    return [[os.stat(path).st_size, os.stat(path).st_mtime_ns] for path in paths]

def write_batch(config, batch):
    """Write the slice of one batch -> its dict, with counts and checksums."""
    data_dir, path, split = config.data_dir, batch["path"], batch["split"]
    marker = Path(data_dir, f"unfinished/{split}_{batch['number']}.json")
    if marker.exists():
        old = json.loads(marker.read_text())
        if batch.items() <= old.items():
            return old
    # a stopped run has changed nothing that is read here
    first_event, place = batch["place"]
    events = np.memmap(f"{data_dir}/{split}_events.bin", EVENT, "r+",
                       first_event * EVENT.itemsize, batch["n_events"])
    detector = data.read_geometry_csv(f"{config.input_dir}/sensor_geometry.csv")
    crc, counts, ranges, hlc_times, is_lit = 0, [], [], [], np.zeros(len(detector[1]), bool)
    with open(f"{data_dir}/{split}_pulses.bin", "r+b") as file:
        file.seek(place * PULSE.itemsize)
        for part, *columns in read_pulses(path, np.asarray(events), len(detector[1])):
            pulses = pack(part, *columns, detector, config)
            is_lit[columns[2]] = True
            hlc_times.append(columns[0][~columns[3]][:1000])
            for name in set(EVENT.names) - {*LABELS, *EXTRA}:
                if np.isnan(part[name]).any():
                    fail(f"{path}: {name} is not filled in; see add_sums")
            if not part["total_charge"].all():
                fail(f"{path}: event {part['event_id'][part['total_charge'] == 0]} has no charge")
            part["start"] = place + np.cumsum(part["length"], dtype="i8") - part["length"]
            place += len(pulses)
            file.write(pulses.tobytes())
            crc = zlib.crc32(pulses.tobytes(), crc)
            n_cut = (part["n_pulses"] > part["length"]).sum()
            counts.append([len(part), len(pulses), n_cut, pulses["aux"].sum()])
            ranges.append([[x.min(), -x.max()] for x in columns[:2]])  # time, charge
        file.flush()
        os.fsync(file.fileno())
    middle = (detector[0][is_lit].min(0) + detector[0][is_lit].max(0)) / 2
    if len(events) >= 100 and np.abs(middle).max() > 100:
        fail(f"{path}: the DOMs with pulses are around {middle.round(1).tolist()} m, not 0; "
             "subtract that in sensor_geometry.csv")
    times = np.concatenate(hlc_times)
    if len(events) >= 100 and not (len(times) and 5000 < np.median(times) < 30_000):
        fail(f"{path}: {len(times)} HLC pulses, some at {times[:3].tolist()} ns, not around "
             "10,000; shift the times of each event, or check auxiliary")
    events.flush()  # on disk before the marker
    batch |= {"counts": np.sum(counts, axis=0).tolist(),
              "ranges": np.min(ranges, axis=0).tolist(),
              "crc": [zlib.crc32(events.tobytes()), crc]}
    utils.write_json(marker, batch)
    return batch

def summarize(batches):
    """Return what meta.json says of a split."""
    batches = sorted(batches, key=lambda b: b["number"])
    counts = np.sum([b["counts"] for b in batches], axis=0).tolist()
    ranges = np.abs(np.min([b["ranges"] for b in batches], axis=0))
    names = ["n_events", "n_pulses", "n_cut", "n_aux", "time", "charge", "batches"]
    rows = [[b["number"], *b["counts"][:2], *b["crc"]] for b in batches]
    return dict(zip(names, [*counts, *ranges.round(3).tolist(), rows]))

def main():
    config = utils.load_config(PrepareConfig, __doc__)
    data_dir, input_dir = Path(config.data_dir), Path(config.input_dir)
    meta_path, unfinished = data_dir / "meta.json", data_dir / "unfinished"
    meta = {"format": data.FORMAT_VERSION, "source": "kaggle", "seed": config.seed,
            "input_dir": str(input_dir.resolve()), "dtypes": data.DTYPES,
            "rule": {"keep": config.keep, "max_pulses": config.max_pulses},
            "split_ranges": json.loads(json.dumps(config.splits))}
    lock = None if meta_path.exists() else utils.lock_folder(unfinished)
    path = meta_path if meta_path.exists() else unfinished / "settings.json"
    settings = json.loads(path.read_text()) if path.exists() else meta
    for name, value in meta.items():
        if settings.get(name) != value:
            fail(f"{path}: made with {name} = {settings.get(name)}, now {value}; "
                 "choose another data_dir")
    if path != meta_path:
        position, string = data.read_geometry_csv(input_dir / "sensor_geometry.csv")
        changed = stamp(*sorted(input_dir.glob("*_*")))  # geometry, meta tables
        if settings.get("changed") != changed:  # a new start
            settings = meta | {"changed": changed, "batches": plan(config)}
            geometry = np.array([*zip(position.tolist(), string)], data.GEOMETRY)
            utils.write_atomic(data_dir / "geometry.bin", geometry.tofile)
            utils.write_json(path, settings)
        jobs = [(config, b | {"changed": stamp(b["path"])}) for b in settings["batches"]]
        finished = {split: [] for split in config.splits}
        def done(batch):
            finished[batch["split"]].append(batch)
            bar.update(batch["n_events"])
        with utils.progress_bar(sum(b["n_events"] for _, b in jobs), "event") as bar:
            utils.run_in_workers(write_batch, jobs, config.workers, done)
        splits = {split: summarize(finished[split]) for split in config.splits}
        settings = meta | {"n_doms": len(position), "splits": splits}
        utils.write_json(meta_path, settings)
    for name, split in settings["splits"].items():
        data.open_split(data_dir, name)  # checks its size
        numbers = [f"{k} {v}" for k, v in split.items() if k != "batches"]
        utils.print0(f"{name}: {', '.join(numbers)}")
    shutil.rmtree(unfinished, ignore_errors=True)
    if path == meta_path:
        utils.print0(f"{data_dir}: complete, nothing to do")

if __name__ == "__main__":
    utils.run_main(main)
