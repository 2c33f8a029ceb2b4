"""What prometheus.py and graphnet.py share: from light and truth to the
Kaggle layout.

DOMs are found by position. An event is shifted so that its first local
coincidence is near 10,000 ns, as Kaggle's trigger. The light says whether
`angles` is right.
"""
import json
import math
import shutil
from dataclasses import asdict
from itertools import chain
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

from data import EVENT, read_geometry_csv, uniform_hash
from prepare import add_sums
from simulate import (META, META_SCHEMA, PULSE, PULSE_SCHEMA, TRIGGER_AT, TRIGGER_SHAKE,
                      local_coincidence, number_along_strings, write_parquet)
from utils import fail, lock_folder, print0, progress_bar, write_json

SURFACE_Z = -1948.07  # [m] IceCube's centre in Prometheus, from the surface
MAX_TIME = 1e6  # [ns] of an event's light after its first
MIN_PULSES = 8  # HLC pulses for a line fit that is worth asking
# the option `angles`: do azimuth and zenith point along the flight (1) or to the source (-1)?
READINGS = {"flight": (1, 1), "source": (-1, -1),
            "zenith_flight": (-1, 1), "azimuth_flight": (1, -1)}
Angles = Literal["flight", "source", "zenith_flight", "azimuth_flight"]

# ---- where the DOMs are -------------------------------------------------------------------------

class Detector(NamedTuple):
    position: np.ndarray  # (V, 3) [m] from the middle of the detector
    string: np.ndarray  # (V,)
    places: np.ndarray  # (V or 2 V, 3) [m] in the events; place i is DOM i % V
    dom_at: dict  # the DOMs that find_doms found so far

def read_table(path):
    return pa.csv.read_csv(path) if path.endswith(".csv") else pq.ParquetFile(path).read()

def read_doms(path) -> Detector:
    """Read Kaggle's sensor_geometry.csv, or GraphNeT's table of a detector."""
    table = read_table(path).to_pydict()
    kind = "dom_" if "dom_x" in table else "sensor_pos_"
    if f"{kind}x" in table:
        places = np.array([table[f"{kind}{axis}"] for axis in "xyz"], np.float64).T
        string = table["string" if "string" in table else "sensor_string_id"]
        string = np.unique(string, return_inverse=True)[1]
        middle = (places[:, 2].min() + places[:, 2].max()) / 2
        for origin in (0, SURFACE_Z):  # not quite the middle of IceCube's DOMs
            middle = origin if abs(middle - origin) < 50 else middle
        position = np.column_stack([places[:, :2], np.round(places[:, 2] - middle, 4)])
    else:
        position, string = read_geometry_csv(path)
        places = np.concatenate([position, position + [0, 0, SURFACE_Z]])
    n_places = len(np.unique(places, axis=0)) if np.isfinite(places).all() else 0
    if n_places < len(places) or len(string) > 32_767:  # ids are int16
        fail(f"{path}: needs a row per DOM, each at its own place, at most 32,767")
    return Detector(position, string, places, {})

def find_doms(detector, x, y, z, where):
    """Return the DOM within 1 m of each position [m] (n,). where: begins the error."""
    # Slow form, for each position: norm(places - (x, y, z), axis=1).argmin() % V.
    # Two positions of one number would be a coincidence of 13 digits.
    number = x + math.pi * y + math.e * z
    numbers, first, inverse = np.unique(number, return_index=True, return_inverse=True)
    for key, i in zip(numbers.tolist(), first):
        if key not in detector.dom_at:
            apart = np.linalg.norm(detector.places - [x[i], y[i], z[i]], axis=1)
            if not apart.min() < 1:
                fail(f"{where}: light at {x[i]:.2f}, {y[i]:.2f}, {z[i]:.2f}, but the nearest "
                     f"DOM is {apart.min():.1f} m away; give the detector's geometry")
            detector.dom_at[key] = int(apart.argmin()) % len(detector.string)
    return np.array([detector.dom_at[key] for key in numbers.tolist()], int)[inverse]

# ---- light and truth -> records -----------------------------------------------------------------

def make_events(config, detector, where, truth, event, dom, time, charge, hlc=None):
    """Return META and PULSE records of the events that have light.

    truth: event_id, azimuth, zenith [rad] as config.angles says, energy [GeV], event_class,
    (n,) each. Pulses, in any order: event (0..n-1), dom, time [ns], charge [p.e.], hlc (bool).
    """
    lit, event = np.unique(event, return_inverse=True)  # those with light
    events = np.zeros(len(lit), META)
    for name, values in truth.items():
        events[name] = values[lit]
    azimuth, zenith = events["azimuth"], events["zenith"]  # views
    good = (np.abs(azimuth) < 6.284) & (zenith >= 0) & (zenith < 3.142)
    if not good.all():
        fail(f"{where}: event {events['event_id'][~good][0]}: angles must be known, in radians")
    azimuth_sign, zenith_sign = READINGS[config.angles]  # ours point to the source
    azimuth[:] = (azimuth + math.pi * (azimuth_sign == 1)) % (2 * math.pi)
    if zenith_sign == 1:
        zenith[:] = np.maximum(math.pi - zenith, 0)  # float32's pi is larger
    events["energy"][~(events["energy"] > 0)] = np.nan

    order = np.lexsort((time, event))
    event, dom, time, charge = event[order], dom[order], time[order], charge[order]
    first = time[np.diff(event, prepend=-1) > 0]
    good = time - first[event] <= MAX_TIME
    if not good.all():
        event_id = events["event_id"][event[~good][0]]
        fail(f"{where}: event {event_id}: times must be numbers within {MAX_TIME:g} ns")
    rung = number_along_strings(detector.position, detector.string)
    near = local_coincidence(event, rung[dom], time - first[event])
    hlc = near if hlc is None else hlc[order]  # not every table has it
    # the first HLC pulse, or else the first, moves to 10,000 ns +- 300; no pulse before 0
    start, backwards = first.copy(), np.flatnonzero(hlc)[::-1]
    start[event[backwards]] = time[backwards]  # the last stays: the earliest
    draw = uniform_hash(config.seed, events["event_id"], np.int64(0))
    shift = TRIGGER_AT + np.rint(TRIGGER_SHAKE * (2 * draw - 1)) - start
    time = np.rint(time + np.maximum(shift, -first)[event])
    events["last_pulse_index"] = np.bincount(event, minlength=len(lit)) - 1
    columns = dom, time, charge, ~hlc, events["event_id"][event]
    return events, np.rec.fromarrays(columns, PULSE)

def collect(chunks, size):
    """Join and cut results of make_events -> META, PULSE of `size` events each."""
    waiting = []
    for chunk in chain(chunks, [None]):
        waiting += [chunk] if chunk else []
        n = sum(len(events) for events, _ in waiting)
        while n and (n >= size or not chunk):
            events, pulses = map(np.concatenate, zip(*waiting))
            batch = events[:size]
            end = np.cumsum(batch["last_pulse_index"] + 1)  # so far it counts in the event
            batch["first_pulse_index"][1:] = end[:-1]
            batch["last_pulse_index"] = end - 1
            yield batch, pulses[:end[-1]]
            waiting, n = [(events[size:], pulses[end[-1]:])], n - len(batch)

# ---- which way do the angles point? -------------------------------------------------------------

def compare_light(detector, events, pulses):
    """Compare line fits with labels -> number of tracks, sums of the cosine's parts."""
    first, aux = events["first_pulse_index"], pulses["auxiliary"]
    n, sums = events["last_pulse_index"] - first + 1, np.zeros(len(events), EVENT)
    columns = pulses["time"], pulses["charge"], pulses["sensor_id"], aux
    add_sums(sums, n, first, *columns, (detector.position, detector.string))
    use = np.add.reduceat(~aux, first, dtype=np.int64) >= MIN_PULSES
    use &= sums["line_fit"].any(axis=1) & (events["event_class"] != 2)
    x, y, z = sums["line_fit"][use].T
    azimuth, zenith = events["azimuth"][use], events["zenith"][use]
    level = (x * np.cos(azimuth) + y * np.sin(azimuth)) * np.sin(zenith)
    return np.array([len(z), level.sum(), (z * np.cos(zenith)).sum()])

def print_check(config, light):
    """Print whether the light confirms the option, or another one."""
    n, level, upright = light
    tracks = f"the light of {n:,.0f} tracks"
    if abs(level) <= math.sqrt(2 * n) or abs(upright) <= math.sqrt(n):  # 3 sigma
        print0(f"angles = {config.angles!r}: {tracks} does not say whether it is right")
        return
    signs = np.sign([level, upright]) * READINGS[config.angles]
    reading = next(name for name in READINGS if READINGS[name] == tuple(signs))
    if reading == config.angles:
        print0(f"angles = {reading!r}: confirmed by {tracks}")
    else:
        print0(f"warning: angles = {config.angles!r} contradicts {tracks}: wrong labels; "
               f"remove {config.out_dir} and convert again with --angles={reading}")

# ---- the folder ---------------------------------------------------------------------------------

def is_complete(config) -> bool:
    """Return whether an earlier run wrote out_dir; refuse other options."""
    record = Path(config.out_dir, "converted.json")
    before = json.loads(record.read_text()) if record.exists() else {}
    now = asdict(config) | {"out_dir": before.get("out_dir")}
    differ = [f"{name} = {before.get(name)!r}" for name in now
              if before.get(name) != now[name]]
    if differ and record.parent.exists():
        fail(f"{config.out_dir}: made with {', '.join(differ)}; choose another out_dir")
    if before:
        print0(f"{config.out_dir} is complete, nothing to do\n{before['next']}")
    return bool(before)

def convert(config, detector, splits, n_events):
    """Write out_dir from {split: results of make_events}: out_dir.part until the end."""
    folder, ranges, number = Path(f"{config.out_dir}.part"), {}, 0
    n_lit, n_pulses, light = 0, 0, 0
    with lock_folder(folder), progress_bar(n_events, "event") as bar:
        shutil.rmtree(folder / "train", ignore_errors=True)  # of a stopped run
        rows = zip(*detector.position.T.tolist(), detector.string.tolist())
        lines = [f"{dom},{x},{y},{z},{s}\n" for dom, (x, y, z, s) in enumerate(rows)]
        lines.insert(0, "sensor_id,x,y,z,string\n")
        (folder / "sensor_geometry.csv").write_text("".join(lines))
        with pq.ParquetWriter(folder / "train_meta.parquet", META_SCHEMA) as meta:
            for split, chunks in splits.items():
                first = number + 1
                for events, pulses in collect(chunks, config.events_per_batch):
                    number += 1
                    ranges[split] = first, number
                    events["batch_id"] = number
                    columns = [events[name] for name in META_SCHEMA.names]
                    meta.write_table(pa.table(columns, META_SCHEMA))
                    path = folder / f"train/batch_{number}.parquet"
                    write_parquet(path, pulses, PULSE_SCHEMA,
                                  use_dictionary=["sensor_id", "charge", "event_id"])
                    light += compare_light(detector, events, pulses)
                    n_lit, n_pulses = n_lit + len(events), n_pulses + len(pulses)
                    bar.update(len(events))
    if not number:
        fail(f"none of {n_events:,} events has light")
    if list(ranges) == ["pretrain"] and number > 1:  # val: the last tenth
        end = number - math.ceil(number / 10)
        ranges = {"pretrain": (1, end), "val": (end + 1, number)}
    data_dir = config.out_dir.removesuffix("_raw")
    data_dir += "_prepared" if data_dir == config.out_dir else ""
    command = (f"next: python prepare.py --input_dir={config.out_dir} "
               f'--data_dir={data_dir} --splits="{ranges}"')
    write_json(folder / "converted.json", asdict(config) | {"next": command})
    folder.rename(config.out_dir)
    print0(f"{config.out_dir}: {number} batches, {n_lit:,} events, {n_pulses:,} pulses; "
           f"{n_events - n_lit:,} events without light were left out")
    print_check(config, light)
    print0(command)
