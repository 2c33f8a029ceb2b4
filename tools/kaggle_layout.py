"""What prometheus.py and graphnet.py share: light and truth -> Kaggle layout.

A pulse belongs to the DOM at its place. The first HLC pulse of an event
moves to 10,000 ns. Bad pulses are left out, more than 1 % are an error.
Line fits to the light check which way the angles point.
"""
import json
import math
import shlex
import shutil
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

from data import EVENT, read_geometry_csv, uniform_hash
from prepare import PrepareConfig, pack
from simulate import (META, META_SCHEMA, PULSE, PULSE_SCHEMA, TRIGGER_AT, TRIGGER_SHAKE,
                      local_coincidence, number_along_strings, write_parquet)
from utils import fail, lock_folder, print0, tqdm, write_json

SURFACE_Z = -1948.07  # [m] IceCube's centre in Prometheus
MAX_TIME, MAX_CHARGE = 1e6, 1e6  # [ns] from an event's middle pulse, [p.e.]
MIN_PULSES = 8  # HLC pulses, for a line fit to rely on
LEFT_OUT, NOWHERE = -1, -2  # instead of a DOM
AT_NO_DOM = "pulses at no DOM of --geometry"
# do azimuth and zenith point along the flight? else they point to the source
READINGS = {"flight": (True, True), "source": (False, False),
            "zenith_flight": (False, True), "azimuth_flight": (True, False)}
Angles = Literal[("auto", *READINGS)]

# ---- where the DOMs are -------------------------------------------------------------------------

class Detector(NamedTuple):
    position: np.ndarray  # (V, 3) [m] from the middle
    string: np.ndarray  # (V,)
    places: np.ndarray  # (P, 3) [m] in the events
    dom: np.ndarray  # (P,) at each place, or LEFT_OUT
    dom_at: dict  # {bytes of a position: DOM}
    bad: dict  # {text: (how many, of how many, the first)}

def open_parquet(path, whole=False):
    try:
        file = pq.ParquetFile(path, buffer_size=2**20, pre_buffer=False)
        return file.read() if whole else file
    except (pa.ArrowException, OSError) as error:
        fail(f"{path}: {str(error).splitlines()[0]}")

def read_table(path):
    """Read .parquet, .csv, or a .geo file of Prometheus."""
    if path.endswith(".csv"):
        return pa.csv.read_csv(path)
    if not path.endswith(".geo"):
        return open_parquet(path, whole=True)
    _, _, text = Path(path).read_text().partition("### Modules ###")
    x, y, z, string, _ = np.array(text.split(), float).reshape(-1, 5).T
    return pa.table({"dom_x": x, "dom_y": y, "dom_z": z, "string": string})

def read_doms(path) -> Detector:
    """Read sensor_geometry.csv, GraphNeT's table, or a .geo file."""
    table = read_table(path).to_pydict()
    if "x" in table:
        places, string = read_geometry_csv(path)
    else:
        kind = "dom" if "dom_x" in table else "sensor_pos"
        places = np.array([table.get(f"{kind}_{axis}", []) for axis in "xyz"], float).T
        string = np.array(table.get("string", table.get("sensor_string_id")))
    n_places = len(np.unique(places, axis=0))  # ids are int16
    if not 0 < len(places) == n_places < 32_768 or not 20 < np.ptp(places) < 20_000:
        fail(f"{path}: needs positions in m, at most 32,767, no two the same")
    z = np.sort(places[:, 2])  # a surface array begins after a gap of 500 m
    z = max(np.split(z, np.flatnonzero(np.diff(z) > 500) + 1), key=len)
    is_dom = (z[0] <= places[:, 2]) & (places[:, 2] <= z[-1])
    far = places[~is_dom, 2]
    if len(far):
        print0(f"{path}: left out {len(far)} rows at z = {far.min():,.0f} to {far.max():,.0f} m")
    middle = (z[0] + z[-1]) / 2
    middle = next(x for x in (0, SURFACE_Z, middle) if abs(x - middle) < 50)
    if middle:
        print0(f"{path}: z is measured from {middle:,.2f} m")
    position = np.round(places[is_dom] - [0, 0, middle], 4)
    string = np.unique(string[is_dom], return_inverse=True)[1]
    # the light may count from the surface though the table does not
    places = np.concatenate([places, places + [0, 0, SURFACE_Z]])
    dom = np.tile(np.where(is_dom, np.cumsum(is_dom) - 1, LEFT_OUT), 2)
    return Detector(position, string, places, dom, {}, {})

def find_doms(detector, where, x, y, z):
    """Return the DOM at each position [m] (n,), within 1 m, or LEFT_OUT or NOWHERE."""
    keys = np.column_stack([x, y, z]).view("V24").ravel().tolist()  # bytes
    for key in sorted({*keys} - detector.dom_at.keys()):
        position = np.frombuffer(key)
        distance = np.linalg.norm(detector.places - position, axis=1)
        detector.dom_at[key] = detector.dom[distance.argmin()]
        if not distance.min() < 1:  # NaN too
            detector.dom_at[key] = NOWHERE
            text = f"{position.round(2)}: the nearest DOM is {distance.min():.1f} m away"
            detector.bad.setdefault(AT_NO_DOM, (0, 0, f"{where}: light at {text}"))
    return np.array([detector.dom_at[key] for key in keys], int)

def count_bad(detector, checks, where="", event_id=None):
    """Add {text: is it bad (n,)} to detector.bad. Without `where` any number is fine."""
    for text, is_bad in checks.items():
        n, n_all, first = detector.bad.get(text, (0, 0, ""))
        if where and is_bad.any():
            first = first or f"{where}: event {event_id[is_bad][0]}"
        detector.bad[text] = n + is_bad.sum(), n_all + len(is_bad), first
    refuse_bad(detector, 0.5, at_least=100_000)  # do not read to the end

def refuse_bad(detector, share, at_least=1):
    for text, (n, n_all, first) in detector.bad.items():
        if first and n > share * n_all and n_all >= at_least:
            fail(f"{first}: {n:,} of {n_all:,} {text}")

# ---- light and truth -> records -----------------------------------------------------------------

def make_events(config, detector, where, truth, event, dom, time, charge, hlc=None):
    """Return META records of the events with light, a list of their PULSE records.

    truth: event_id, azimuth, zenith [rad], energy [GeV], event_class of n events.
    Pulses, in any order: event (0..n-1), dom, time [ns], charge [p.e.], hlc if known.
    """
    order = np.lexsort((time, event))  # NaN is last
    event, dom, time, charge = (x[order] for x in (event, dom, time, charge))
    n = np.bincount(event)
    middle = np.cumsum(n) - 1 - n // 2
    is_near = np.abs(time - time[middle[event]]) <= MAX_TIME
    is_charge = (charge >= 0) & (charge <= MAX_CHARGE)
    bad = {AT_NO_DOM: dom == NOWHERE,
           f"pulses without a time within {MAX_TIME:g} ns": ~is_near | (time == -1),
           "pulses without a charge in p.e.": ~is_charge}
    count_bad(detector, bad, where, truth["event_id"][event])
    good = (dom != LEFT_OUT) & ~np.any([*bad.values()], axis=0)
    has_light = np.bincount(event[good], charge[good], len(truth["event_id"])) > 0
    count_bad(detector, {"pulses at left-out rows": dom == LEFT_OUT,
                         "events without light": ~has_light})
    good &= has_light[event]

    events = np.zeros(has_light.sum(), META)
    for name, values in truth.items():
        events[name] = values[has_light]
    set_labels(config, detector, where, events)

    event = np.unique(event[good], return_inverse=True)[1]  # of those with light
    begin = np.flatnonzero(np.diff(event, prepend=-1))
    dom, time, charge = dom[good], time[good], charge[good]
    time = time - time[begin][event]  # [ns] from the first pulse
    rung = number_along_strings(detector.position, detector.string)
    near = local_coincidence(event, rung[dom], time)
    hlc = near if hlc is None else hlc[order][good]
    # the first HLC pulse, or else the first, moves to 10,000 +- 300 ns; none before 0
    trigger = np.minimum.reduceat(np.where(hlc, time, np.inf), begin)
    trigger[trigger == np.inf] = 0
    draw = uniform_hash(config.seed, events["event_id"], np.int64(0))
    shift = TRIGGER_AT + np.rint(TRIGGER_SHAKE * (2 * draw - 1)) - trigger
    time = np.rint(time + np.maximum(shift, 0)[event])
    columns = dom, time, charge, ~hlc, events["event_id"][event]
    return events, np.split(np.rec.fromarrays(columns, PULSE), begin[1:])

def set_labels(config, detector, where, events):
    """Let the angles point to the source. What is unknown becomes NaN."""
    azimuth, zenith, energy = events["azimuth"], events["zenith"], events["energy"]
    no_angles = ~((np.abs(azimuth) < 6.284) & (zenith >= 0) & (zenith < 3.1416))
    bad = {"events without angles in radians": no_angles}
    count_bad(detector, bad, where, events["event_id"])
    count_bad(detector, {"events without an energy": ~(energy > 0)})
    energy[~(energy > 0)] = azimuth[no_angles] = zenith[no_angles] = np.nan
    along_azimuth, along_zenith = READINGS[config.reading]
    azimuth[:] = (azimuth + math.pi * along_azimuth) % (2 * math.pi)
    zenith[:] = np.abs(math.pi * along_zenith - zenith)  # float32's pi is larger

def make_batches(chunks, size):
    """Regroup results of make_events -> META, PULSE of `size` events each."""
    pairs = (pair for chunk in chunks for pair in zip(*chunk))
    while batch := [*islice(pairs, size)]:
        events, pulses = zip(*batch)
        events, n = np.array(events), [len(rows) for rows in pulses]
        events["first_pulse_index"] = np.cumsum(n) - n
        events["last_pulse_index"] = np.cumsum(n) - 1
        yield events, np.concatenate(pulses)

# ---- which way do the angles point? -------------------------------------------------------------

def compare_light(detector, events, pulses):
    """Compare line fits with labels -> number of tracks, two sums of cosines."""
    events = events[:1000]  # enough of a batch
    pulses = pulses[:events["last_pulse_index"][-1] + 1]
    first, aux = events["first_pulse_index"], pulses["auxiliary"]
    sums = np.zeros(len(events), EVENT)
    sums["n_pulses"] = events["last_pulse_index"] - first + 1
    columns = pulses["time"], pulses["charge"], pulses["sensor_id"], aux
    pack(sums, *columns, detector[:2], PrepareConfig())
    use = np.add.reduceat(~aux, first, dtype=int) >= MIN_PULSES
    use &= (events["event_class"] != 2) & np.isfinite(events["zenith"])
    x, y, z = sums["line_fit"][use].T
    azimuth, zenith = events["azimuth"][use], events["zenith"][use]
    level = (x * np.cos(azimuth) + y * np.sin(azimuth)) * np.sin(zenith)
    return np.array([len(z), level.sum(), (z * np.cos(zenith)).sum()])

def check_angles(config, light):
    """Print whether the light confirms config.reading; with "auto" it must."""
    n, level, upright = light
    is_sure = abs(level) > math.sqrt(2 * n) and abs(upright) > math.sqrt(n)  # 3 sigma
    along_azimuth, along_zenith = READINGS[config.reading]
    right = along_azimuth ^ (level < 0), along_zenith ^ (upright < 0)
    name = next(name for name in READINGS if READINGS[name] == right)
    text, tracks = f"angles = {config.reading!r}:", f"the light of {n:,.0f} tracks"
    say = fail if config.angles == "auto" else print0
    if not is_sure:
        say(f"{text} {tracks} does not say whether it is right; set --angles if you know")
    elif name != config.reading:
        say(f"{text} {tracks} contradicts it; convert again with --angles={name}")
    else:
        print0(f"{text} confirmed by {tracks}")

# ---- the folder ---------------------------------------------------------------------------------

def is_complete(config) -> bool:
    """Return whether an earlier run wrote out_dir; refuse other options."""
    record = Path(config.out_dir, "converted.json")
    old = json.loads(record.read_text()) if record.exists() else {}
    for name, value in asdict(config).items():
        if record.parent.exists() and name != "out_dir" and old.get(name) != value:
            fail(f"{config.out_dir}: made with {name} = {old.get(name)!r}; choose another out_dir")
    if old:
        print0(f"{config.out_dir} is complete, nothing to do\n{old['next']}")
    return bool(old)

def convert(config, detector, splits, n_events):
    """Write {split: results of make_events}; until the end it is out_dir.part."""
    out_dir = config.out_dir.rstrip("/")
    folder, number, ranges, light = Path(f"{out_dir}.part"), 0, {}, 0
    with (lock_folder(folder), tqdm(total=n_events, disable=None) as bar,
          pq.ParquetWriter(folder / "train_meta.parquet", META_SCHEMA) as meta):
        shutil.rmtree(folder / "train", ignore_errors=True)  # of a stopped run
        x, y, z = detector.position.T
        table = {"sensor_id": np.arange(len(x)), "x": x, "y": y, "z": z,
                 "string": detector.string}
        pa.csv.write_csv(pa.table(table), folder / "sensor_geometry.csv")
        for split, chunks in splits.items():
            first = number + 1
            for events, pulses in make_batches(chunks, config.events_per_batch):
                number += 1
                ranges[split] = first, number
                events["batch_id"] = number
                columns = [events[name] for name in META_SCHEMA.names]
                meta.write_table(pa.table(columns, META_SCHEMA))
                write_parquet(folder / f"train/batch_{number}.parquet", pulses, PULSE_SCHEMA)
                light += compare_light(detector, events, pulses)
                bar.update(len(events))
    refuse_bad(detector, 0.01)
    if not number:
        fail(f"none of {n_events:,} events has light")
    check_angles(config, light)
    if list(ranges) == ["pretrain"] and number > 1:  # val: the last tenth
        end = number - math.ceil(number / 10)
        ranges = {"pretrain": (1, end), "val": (end + 1, number)}
    data_dir = out_dir.removesuffix("_raw")
    data_dir += "_prepared" if data_dir == out_dir else ""
    folders = shlex.join([f"--input_dir={out_dir}", f"--data_dir={data_dir}"])
    command = f'next: python prepare.py {folders} --splits="{ranges}"'
    write_json(folder / "converted.json", asdict(config) | {"next": command})
    folder.rename(out_dir)
    bad = [f"{n:,} {text}" for text, (n, *_) in detector.bad.items() if n]
    print0(f"{out_dir}: {n_events:,} events; left out or NaN: {', '.join(bad) or 'nothing'}"
           f"\n{command}")
