"""Stage 1: events in the Kaggle layout -> a data folder of .bin files.

    python prepare.py sample_config/demo_prepare.py          # seconds
    python prepare.py config/kaggle_prepare.py --workers=16  # 102 M events, 81 GB

Prints what each split holds. The same command resumes.
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
    splits: dict = field(default_factory=lambda: {  # batches, or "test"
        "pretrain": (1, 500), "finetune": (601, 605), "val": (651, 655)})
    skip_missing: bool = False  # leave out batches that are not there
    max_pulses: int = 127  # pulses kept of an event: 128 tokens with [CLS]
    keep: Literal["random", "brightest"] = "random"  # which of too many pulses
    seed: int = 0  # of the random choice
    origin: str = "0,0,0"  # [m] of the detector's middle
    shift_times: bool = False  # move each event's first HLC pulse to 10,000 ns
    workers: int = 0  # processes, 0.3 GB each; 0 = one per core
    verify: bool = False  # compare a complete folder with its checksums

def assign_batches(splits) -> dict:
    """Return {batch: split}; all batches of the test set are "test"."""
    split_of = {}
    for name, spans in splits.items():
        for span in spans if isinstance(spans, list) else [spans]:
            is_pair = isinstance(span, tuple) and [*map(type, span)] == [int, int]
            numbers = range(span[0], span[1] + 1) if is_pair else ["test"] * (span == "test")
            if not name.isidentifier() or not numbers or split_of.keys() & set(numbers):
                fail(f"splits: {name!r}: {span!r}: write name: (first, last) batch, a list of "
                     "such pairs, or 'test'; each batch once")
            split_of |= dict.fromkeys(numbers, name)
    return split_of

# ---- read ---------------------------------------------------------------------------------------

CHUNK = 2**16  # rows at a time: arrays fit the cache
PULSES = ["time", "charge", "sensor_id", "auxiliary", "event_id"]
META = ["batch_id", "event_id", "first_pulse_index", "last_pulse_index"]
LABELS, EXTRA = ["azimuth", "zenith"], ["energy", "event_class"]  # Kaggle has no EXTRA
LIGHT_SPEED, LATE, FAR = 0.22, 200.0, 153.0  # [m/ns], [ns], [m] of the line fit, 1308.5501
COUNTS = ["n_events", "n_pulses", "n_cut", "n_aux"]  # of a split, in meta.json
TYPES = dict.fromkeys(["time", "charge", "energy", *LABELS], "f8") | {"auxiliary": "?"}

def read_columns(path, names, optional=()):
    """Yield (row, {name: array}) of a parquet file, CHUNK rows from `row` on."""
    row, name = 0, "file"
    try:
        file = pq.ParquetFile(path, buffer_size=2**20, pre_buffer=False,  # else 9 GB
                              page_checksum_verification=True)
        names = names + [x for x in optional if x in file.schema_arrow.names]
        for batch in file.iter_batches(CHUNK, columns=names, use_threads=False):
            table = {}
            for name in names:
                values, kind = batch[name].to_numpy(zero_copy_only=False), TYPES.get(name, "i8")
                table[name] = values.astype(kind, casting="same_kind", copy=False)
            yield row, table
            row += len(batch)
    except (pa.ArrowException, OSError, LookupError, TypeError, ValueError) as error:
        fail(f"{path}: {name} cannot be read after row {row}: {str(error).splitlines()[0]}")

def table_to_events(path, row, table, before):
    """Turn rows of a meta table into EVENT records."""
    batch_id, _, first, last = (table[name] for name in META)
    events = np.zeros(len(first), EVENT)
    for name in ("event_id", *LABELS, *EXTRA):
        events[name] = table.get(name, 0 if name == "event_class" else np.nan)  # unknown
    events["n_pulses"] = last - first + 1
    step = np.diff(batch_id, prepend=before[0])
    begin = np.where(step > 0, 0, np.append(before[1], last[:-1]) + 1)
    required = {
        "sort the table by batch_id": step >= 0,
        "pulses must follow the event before": (first == begin) & (last >= first),
        "azimuth must be in radians": ~(np.abs(events["azimuth"]) > 6.2832),
        "zenith must be in radians": ~(np.abs(events["zenith"] - 1.5708) > 1.5709),
        "energy must be above 0 GeV, or NaN": np.nan_to_num(events["energy"], nan=1, posinf=0) > 0,
        "event_class must be 0, 1 or 2": np.isin(table.get("event_class", 0), (0, 1, 2))}
    for text, is_good in required.items():
        if not is_good.all():
            i = np.argmin(is_good)
            values = ", ".join(f"{name} {column[i]}" for name, column in table.items())
            fail(f"{path}: row {row + i}: {text}; it has {values}")
    return events

def read_pulses(path, events, n_doms, config):
    """Yield (events, time, charge, dom, aux) of some whole events."""
    end = np.cumsum(events["n_pulses"], dtype="i8")
    done, rest = 0, [np.zeros(0, bool)] * 5  # of an incomplete event
    for row, table in read_columns(path, PULSES):
        columns = [np.append(old, table[name]) for old, name in zip(rest, PULSES)]
        ready = int(np.searchsorted(end, row + len(table["time"]), side="right"))
        part = events[done:ready]
        owner = np.repeat(part["event_id"], part["n_pulses"])
        if (columns[-1][:len(owner)] != owner).any():
            fail(f"{path}: near row {row}: event_id is not the meta table's")
        time, charge, dom, aux, _ = (column[:len(owner)] for column in columns)
        if config.shift_times and len(part):
            begin = np.flatnonzero(np.diff(owner, prepend=owner[0] - 1))
            first = np.minimum.reduceat(time, begin)
            trigger = np.minimum.reduceat(np.where(aux, np.inf, time), begin)
            trigger = np.where(trigger < np.inf, trigger, first)
            time = time + np.repeat(np.maximum(10_000 - trigger, -first), part["n_pulses"])
        for name, values, high in (("time", time, 2**24), ("charge", charge, 1e6),  # exact float32
                                   ("sensor_id", dom, n_doms - 1)):
            bad = np.flatnonzero(~((values >= 0) & (values <= high)))  # NaN too
            if len(bad):
                fail(f"{path}: event {owner[bad[0]]}: {name} {values[bad[0]]} is not 0 to {high}")
        if len(part):
            yield part, time, charge, dom, aux
        done, rest = ready, [column[len(owner):] for column in columns]
    if done < len(events) or len(rest[0]):
        fail(f"{path}: has not the {end[-1]} rows of the meta table")

# ---- rule: which pulses an event keeps ----------------------------------------------------------
# Of too many pulses an event keeps its HLC pulses (aux = False) and random others; if the HLC
# pulses alone are too many, a random choice of them (upstream's rule). keep = "brightest": the
# first HLC pulse of the DOMs with most charge, with the charge up to the DOM's next kept one.

def pack(events, time, charge, dom, aux, detector, config):
    """Apply the rule to events (B,) -> the PULSE records they keep. Fill in their sums.

    time, charge, dom, aux: all their pulses. detector: position (V, 3) [m], string (V,).
    """
    n = events["n_pulses"].astype("i8")
    begin, event = np.cumsum(n) - n, np.repeat(np.arange(len(n)), n)
    if ((time[1:] < time[:-1]) & (event[1:] == event[:-1])).any():
        order = np.lexsort((time, event))  # stable: ties stay
        time, charge, dom, aux = time[order], charge[order], dom[order], aux[order]
    events["length"] = np.minimum(n, config.max_pulses)
    events["total_charge"] = total = np.add.reduceat(charge, begin)
    for axis in range(3):
        moment = charge * detector[0][:, axis].take(dom, mode="clip")
        events["center"][:, axis] = np.add.reduceat(moment, begin) / np.where(total, total, 1)
    hlc = np.flatnonzero(~aux)
    channel = event[hlc] * len(detector[1]) + dom[hlc]
    owner = first_of(channel)  # the first HLC pulse of the DOM
    is_first = owner == np.arange(len(hlc))
    first, dom_charge = hlc[is_first], np.bincount(owner, charge[hlc], len(hlc))[is_first]
    fit_lines(events, event[first], time[first], dom[first], dom_charge, *detector)
    # each pulse draws a number, HLC pulses below all others; an event keeps its smallest
    # DIFF(upstream): a hash of event and pulse, so the order of batches changes nothing
    place = np.arange(len(event)) - np.repeat(begin, n)
    draw = data.uniform_hash(config.seed, events["event_id"], place, n) + aux
    if config.keep == "brightest":
        draw[first] = 1e-3 * draw[first] - 1e-3 - dom_charge
    # slow form, per event: keep = draw <= np.sort(draw)[max_pulses - 1]
    last, limit = config.max_pulses - 1, np.full(len(n), np.inf)
    for i in np.flatnonzero(n > config.max_pulses).tolist():
        limit[i] = np.partition(draw[begin[i]:begin[i] + n[i]], last)[last]
    keep = draw <= np.repeat(limit, n)
    if config.keep == "brightest":
        order = np.argsort(channel, kind="stable")
        takes = np.flatnonzero((keep[hlc] | is_first)[order])
        hlc, charge = hlc[order], charge.copy()
        charge[hlc[takes]] = np.add.reduceat(charge[hlc], takes)
    keep = np.flatnonzero(keep)
    pulses = np.empty(events["length"].sum(dtype="i8"), PULSE)
    for name, values in zip(PULSE.names, (time, charge, dom, aux)):
        pulses[name] = values[keep]  # raises at equal draws
    return pulses

def first_of(key):
    """Return the index of the first equal key, for each; key >= 0."""
    index, slot = np.arange(len(key)), np.empty(key.max(initial=0) + 1, "i4")
    slot[key[::-1]] = index[::-1]  # the last one written stays
    return slot[key]

def fit_lines(events, event, time, dom, charge, position, string):
    """Fill in line_fit from the first HLC pulse of each DOM.

    It goes against v of the line r + v time, fitted without pulses later than light from their
    string's first, then again with less weight far from it (astro-ph/0407044, 1308.5501).
    """
    x, y, z = position.T[:, dom]
    first = first_of(event * (string.max() + 1) + string[dom])  # of the string
    is_late = time - time[first] > np.abs(z - z[first]) / LIGHT_SPEED + LATE
    charge = weight = np.where(is_late, 0, charge)
    for _ in range(2):
        total = np.maximum(np.bincount(event, weight), 1e-9)
        def mean(values):  # of each event
            return np.bincount(event, weight * values) / total
        t, *xyz = [values - mean(values)[event] for values in (time, x, y, z)]
        variance = np.maximum(mean(t * t), 1e-9)
        v = np.array([mean(t * values) / variance for values in xyz])  # (3, B) [m/ns]
        off = sum((values - speed[event] * t) ** 2 for values, speed in zip(xyz, v))
        weight = charge / (1 + off / FAR ** 2)
    speed = np.linalg.norm(v, axis=0)  # of one DOM or one time 1e-13, by rounding
    events["line_fit"][:len(speed)] = np.where(speed > 1e-9, -v / np.maximum(speed, 1e-9), 0).T

# ---- plan, write, main --------------------------------------------------------------------------

def plan(config):
    """Give each batch its place -> dicts. Write EVENT records, empty pulses."""
    for marker in Path(config.data_dir).glob("unfinished/*.json"):
        marker.unlink()
    split_of, batches, ids = assign_batches(config.splits), {}, [np.zeros(0, "i8")]
    place = {split: np.zeros(2, "i8") for split in config.splits}  # events, pulses
    for kind in sorted({"test" if key == "test" else "train" for key in split_of}):
        meta_path, before = f"{config.input_dir}/{kind}_meta.parquet", (-1, -1)
        for row, table in read_columns(meta_path, META + LABELS * (kind == "train"), EXTRA):
            events = table_to_events(meta_path, row, table, before)
            before = table["batch_id"][-1], table["last_pulse_index"][-1]
            for number in np.unique(table["batch_id"]).tolist():
                key = number if kind == "train" else "test"
                path = f"{config.input_dir}/{kind}/batch_{number}.parquet"
                if key not in split_of or not os.path.exists(path):
                    continue
                split, part = split_of[key], events[table["batch_id"] == number]
                batch = batches.setdefault((key, number), {"split": split, "number": number,
                    "n_events": 0, "path": path, "place": place[split].tolist()})
                batch["n_events"] += len(part)
                mode = "ab" if place[split][0] else "wb"
                with open(f"{config.data_dir}/{split}_events.bin", mode) as file:
                    file.write(part.tobytes())
                n_kept = np.minimum(part["n_pulses"], config.max_pulses).sum(dtype="i8")
                place[split] += len(part), n_kept
                ids += [part["event_id"].copy()] * (kind == "train")
    missing = [*split_of.keys() - {key for key, _ in batches}]
    if missing and not (config.skip_missing and all(n_events for n_events, _ in place.values())):
        fail(f"{config.input_dir}: {len(missing)} batches, for example {missing[0]}, have no file "
             "or no rows in the meta table; --skip_missing=True leaves them out")
    ids = np.sort(np.concatenate(ids))
    if (ids[1:] == ids[:-1]).any():
        fail(f"{config.input_dir}: event_id {ids[1:][ids[1:] == ids[:-1]][0]} is there twice")
    for split, (_, n_pulses) in place.items():
        with open(f"{config.data_dir}/{split}_pulses.bin", "wb") as file:
            file.truncate(n_pulses * PULSE.itemsize)
    return list(batches.values())

def stamp(*paths):
    return [[os.stat(path).st_size, os.stat(path).st_mtime_ns] for path in paths]

def write_batch(config, batch):
    """Write the slice of one batch -> its dict, with counts and checksums."""
    data_dir, path, split = config.data_dir, batch["path"], batch["split"]
    marker = Path(data_dir, f"unfinished/{split}_{batch['number']}.json")
    if marker.exists() and batch.items() <= (old := json.loads(marker.read_text())).items():
        return old
    (first_event, place), end = batch["place"], batch["place"][1]
    events = np.memmap(f"{data_dir}/{split}_events.bin", EVENT, "r+",
                       first_event * EVENT.itemsize, batch["n_events"])
    detector = data.read_geometry_csv(f"{config.input_dir}/sensor_geometry.csv", config.origin)
    with open(f"{data_dir}/{split}_pulses.bin", "r+b") as file:
        file.seek(place * PULSE.itemsize)
        for part, *columns in read_pulses(path, np.asarray(events), len(detector[1]), config):
            pulses = pack(part, *columns, detector, config)
            part["start"] = end + np.cumsum(part["length"], dtype="i8") - part["length"]
            kept_charge = np.add.reduceat(pulses["charge"], part["start"] - end)
            if not kept_charge.all():
                fail(f"{path}: event {part['event_id'][kept_charge == 0][0]} lacks charge")
            end += len(pulses)
            file.write(pulses.tobytes())
        file.flush()
        os.fsync(file.fileno())
    events.flush()  # on disk before the marker
    pulses = np.memmap(file.name, PULSE, "r", place * PULSE.itemsize, end - place)
    sample = pulses[:10**6]
    lit, hlc = detector[0][np.unique(sample["dom"])], sample["time"][~sample["aux"]]
    middle, size = (lit.min(0) + lit.max(0)) / 2, np.ptp(lit, axis=0).max()  # [m]
    time = np.median(hlc) if len(hlc) else 0
    is_right = np.abs(middle).max() <= 100 and 20 <= size <= 20_000
    if len(events) >= 100 and not (is_right and 5000 < time < 30_000 and np.std(hlc) > 10):
        fail(f"{path}: DOMs with pulses are around {middle.round(1).tolist()} m (expected: 0), "
             f"within {size:.3g} m; {len(hlc)} HLC pulses are around {time:.0f} ns (10,000) +- "
             f"{np.std(hlc):.2g}: see --origin, --shift_times, or check units and auxiliary")
    row = (batch["number"], len(events), len(pulses), (events["length"] < events["n_pulses"]).sum(),
           pulses["aux"].sum(), zlib.crc32(events.tobytes()), zlib.crc32(pulses.tobytes()))
    batch["row"] = [*map(int, row)]
    utils.write_json(marker, batch)
    return batch

def main():
    config = utils.load_config(PrepareConfig, __doc__)
    data_dir, input_dir = Path(config.data_dir), Path(config.input_dir)
    meta_path, unfinished = data_dir / "meta.json", data_dir / "unfinished"
    meta = data.FORMAT | {
        "source": "kaggle", "seed": config.seed, "input_dir": str(input_dir.resolve()),
        "split_ranges": json.loads(json.dumps(config.splits)), "origin": config.origin,
        "shift_times": config.shift_times, "rule": {"max_pulses": config.max_pulses,
            "keep": config.keep + ", shifted" * config.shift_times}}
    lock = None if meta_path.exists() else utils.lock_folder(unfinished)
    path, settings = unfinished / "settings.json", meta
    if meta_path.exists():
        path, (settings, _) = meta_path, data.read_folder(data_dir)
        if any(x.stat().st_mtime > path.stat().st_mtime for x in input_dir.glob("*_*.*")):
            settings["input_dir"] += ", before it changed"  # refused below
        utils.print0(f"{data_dir}: complete, nothing to do")
    elif path.exists():
        settings = json.loads(path.read_text())
    for name, value in meta.items():
        if settings.get(name) != value:
            fail(f"{path}: made with {name} = {settings.get(name)}, now {value}; use another one")
    if not 0 < config.max_pulses < 2**16:
        fail(f"max_pulses = {config.max_pulses}: must be 1 to 65535")
    if path != meta_path:
        position, string = data.read_geometry_csv(input_dir / "sensor_geometry.csv", config.origin)
        geometry = np.array([*zip(position.tolist(), string)], data.GEOMETRY)
        utils.write_atomic(data_dir / "geometry.bin", geometry.tofile)
        utils.print0(f"{len(string)} DOMs on {len(set(string))} strings")
        changed = stamp(*sorted(input_dir.glob("*")))  # tables; is a file new?
        if settings.get("changed") != changed:  # a new start
            settings = meta | {"changed": changed, "batches": plan(config)}
            utils.write_json(path, settings)
        jobs = [(config, b | {"changed": stamp(b["path"])}) for b in settings["batches"]]
        finished = []
        def done(batch):
            finished.append(batch)
            bar.update(batch["n_events"])
        with utils.tqdm(total=sum(b["n_events"] for _, b in jobs), disable=None) as bar:
            utils.run_in_workers(write_batch, jobs, config.workers, done)
        splits = {}
        for split in config.splits:
            rows = sorted(batch["row"] for batch in finished if batch["split"] == split)
            splits[split] = dict(zip(COUNTS, np.sum(rows, axis=0)[1:].tolist())) | {"batches": rows}
        settings = meta | {"geometry_crc": zlib.crc32(geometry.tobytes()), "splits": splits}
        utils.write_json(meta_path, settings | {"fingerprint": data.fingerprint(settings)})
    for name, split in settings["splits"].items():
        files, rows = data.open_split(data_dir, name), np.array(split["batches"])
        for i, array in enumerate(files[1:3] if config.verify else ()):  # events, pulses
            parts = np.split(array, rows[:-1, 1 + i].cumsum())
            if [zlib.crc32(part.tobytes()) for part in parts] != rows[:, 5 + i].tolist():
                fail(f"{files.path}_*.bin: not as in meta.json; prepare into another data_dir")
        e, counts = files.events[:100_000], ", ".join(f"{key} {split[key]}" for key in COUNTS)
        x, y, z = e["line_fit"].T
        cosine = (x * np.cos(e["azimuth"]) + y * np.sin(e["azimuth"])) * np.sin(e["zenith"])
        cosine = np.nan_to_num(cosine + z * np.cos(e["zenith"])).mean()  # unlabelled: 0
        text = f"{cosine:.3f}{', are labels reversed?' if cosine < -0.1 else ''}"
        utils.print0(f"{name}: {len(rows)} batches, {counts}, cosine of line fit and label {text}")
    shutil.rmtree(unfinished, ignore_errors=True)

if __name__ == "__main__":
    utils.run_main(main)
