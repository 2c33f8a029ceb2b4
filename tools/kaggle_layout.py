"""What prometheus.py and graphnet.py share: from light and truth to the
Kaggle layout.

DOMs are found by position; the first local coincidence of an event moves to
10,000 ns, as in Kaggle's data. The light says whether `angles` is right.
A bad pulse is left out; if more than 1 % are bad, that is an error.
"""
import json
import math
import shlex
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

SURFACE_Z = -1948.07  # [m] IceCube's centre in Prometheus, 6 m below the middle of its DOMs
MAX_TIME, MAX_CHARGE = 1e6, 1e6  # [ns] from the middle pulse of an event, [p.e.] of a pulse
SURFACE, NOWHERE = -1, -2  # light there has no DOM
AWAY = "pulses at no DOM of --geometry"
HARMLESS = "pulses at left-out rows", "events without an energy"  # may be many
MIN_PULSES = 8  # HLC pulses for a line fit that is worth asking
# the option `angles`: do azimuth and zenith point along the flight (1) or to the source (-1)?
READINGS = {"flight": (1, 1), "source": (-1, -1),
            "zenith_flight": (-1, 1), "azimuth_flight": (1, -1)}
Angles = Literal["auto", "flight", "source", "zenith_flight", "azimuth_flight"]

# ---- where the DOMs are -------------------------------------------------------------------------

class Detector(NamedTuple):
    position: np.ndarray  # (V, 3) [m] from the middle of the detector
    string: np.ndarray  # (V,)
    places: np.ndarray  # (P, 3) [m] in the events
    dom: np.ndarray  # (P,) at each place, or SURFACE
    dom_at: dict  # the DOMs that find_doms found so far, and {AWAY: text}
    bad: dict  # {what: (how many, of how many, the first)}

def open_parquet(path):
    open(path, "rb").close()  # its error says enough
    try:
        return pq.ParquetFile(path, buffer_size=2**20, pre_buffer=False)
    except (pa.ArrowException, OSError) as error:
        fail(f"{path}: cannot be read ({str(error).splitlines()[0]}); get the file again")

def read_table(path):
    if path.endswith(".geo"):  # Prometheus' text: x, y, z, string, number on the string
        text = Path(path).read_text().partition("### Modules ###")[2].strip()
        columns = zip(*(line.split() for line in text.splitlines()))
        return pa.table(dict(zip(("dom_x", "dom_y", "dom_z", "string"), columns)))
    return pa.csv.read_csv(path) if path.endswith(".csv") else open_parquet(path).read()

def read_doms(path) -> Detector:
    """Read Kaggle's sensor_geometry.csv, GraphNeT's table of a detector, or a .geo file."""
    table = read_table(path).to_pydict()
    kind = "dom_" if "dom_x" in table else "sensor_pos_"
    is_kaggle = path.endswith(".csv") and f"{kind}x" not in table
    if is_kaggle:
        places, string = read_geometry_csv(path)
    else:
        places = np.array([table.get(f"{kind}{axis}", []) for axis in "xyz"], np.float64).T
        string = np.array(table.get("string", table.get("sensor_string_id")), np.float64)
    n_places = len(np.unique(places, axis=0))  # ids are int16
    if not 0 < len(places) == n_places < 32_768 or not 20 < np.ptp(places) < 20_000:
        fail(f"{path}: needs positions in m of at most 32,767 DOMs, each at its own place")
    if is_kaggle:
        position, places = places, np.concatenate([places, places + [0, 0, SURFACE_Z]])
        return Detector(position, string, places, np.tile(np.arange(len(position)), 2), {}, {})
    z = np.sort(places[:, 2])  # a surface array begins after a gap of 500 m
    group = np.searchsorted(z[1:][np.diff(z) > 500], places[:, 2], side="right")
    is_dom = group == np.bincount(group).argmax()
    far, dom = places[~is_dom, 2], np.where(is_dom, np.cumsum(is_dom) - 1, SURFACE)
    if len(far):
        print0(f"{path}: left out {len(far)} rows at z = {far.min():,.0f} to {far.max():,.0f} m")
    position, string = places[is_dom], np.unique(string[is_dom], return_inverse=True)[1]
    middle = (position[:, 2].min() + position[:, 2].max()) / 2
    middle = next((z for z in (0, SURFACE_Z) if abs(middle - z) < 50), middle)  # IceCube's
    if middle:
        print0(f"{path}: z is measured from {middle:,.2f} m")
    position[:, 2] = np.round(position[:, 2] - middle, 4)
    return Detector(position, string, places, dom, {}, {})

def find_doms(detector, x, y, z):
    """Return the DOM within 1 m of each position [m] (n,), or SURFACE or NOWHERE."""
    # Slow form, for each position: dom[norm(places - (x, y, z), axis=1).argmin()].
    # Two positions of one number would be a coincidence of 13 digits.
    number = x + math.pi * y + math.e * z
    number[np.isnan(number)] = np.inf  # NaN is no key
    numbers, first, inverse = np.unique(number, return_index=True, return_inverse=True)
    for key, i in zip(numbers.tolist(), first):
        if key not in detector.dom_at:
            place = np.array([x[i], y[i], z[i]])
            apart = np.linalg.norm(detector.places - place, axis=1)
            detector.dom_at[key] = int(detector.dom[apart.argmin()])
            if not apart.min() < 1:
                detector.dom_at[key] = NOWHERE
                text = f", as {place.round(2)}: the nearest DOM is {apart.min():.1f} m away"
                detector.dom_at.setdefault(AWAY, text)
    return np.array([detector.dom_at[key] for key in numbers.tolist()], int)[inverse]

def count_bad(detector, where, event_id, checks):
    """Count what is bad -> is good (n,). checks: {what: is bad (n,)}."""
    good = np.ones(len(event_id), bool)
    for what, is_bad in checks.items():
        bad = event_id[good & is_bad]
        good &= ~is_bad
        first = f"{where}: event {bad[0]}" if len(bad) else ""
        count = detector.bad.setdefault(what, [0, 0, ""])
        count[:] = count[0] + len(bad), count[1] + len(good), count[2] or first
    refuse_bad(detector, 0.5, 100_000)
    return good

def refuse_bad(detector, share, at_least=1):
    """End if more than a share is bad, of at_least so many."""
    for what, (n, n_all, first) in detector.bad.items():
        if n > share * n_all and n_all >= at_least and what not in HARMLESS:
            fail(f"{first}: {n:,} of {n_all:,} {what}{detector.dom_at.get(what, '')}")

# ---- light and truth -> records -----------------------------------------------------------------

def make_events(config, detector, where, truth, event, dom, time, charge, hlc=None):
    """Return META and PULSE records of the events that have light.

    truth: event_id, azimuth, zenith [rad] as config.reading says, energy [GeV], event_class,
    (n,) each. Pulses, in any order: event (0..n-1), dom, time [ns], charge [p.e.], hlc (bool).
    """
    order = np.lexsort((time, event))  # NaN is last
    event, dom, time, charge = event[order], dom[order], time[order], charge[order]
    n = np.bincount(event)
    away = np.abs(time - time[(np.cumsum(n) - 1 - n // 2)[event]])  # from the middle pulse
    good = count_bad(detector, where, truth["event_id"][event], {
        HARMLESS[0]: dom == SURFACE, AWAY: dom == NOWHERE,
        f"pulses without a time within {MAX_TIME:g} ns": ~(away <= MAX_TIME) | (time == -1),
        "pulses without a charge in p.e.": ~((charge >= 0) & (charge <= MAX_CHARGE))})
    good &= np.bincount(event[good], charge[good], len(truth["event_id"]))[event] > 0
    lit, event = np.unique(event[good], return_inverse=True)  # those with light
    dom, time, charge = dom[good], time[good], charge[good]
    events = np.zeros(len(lit), META)
    for name, values in truth.items():
        events[name] = values[lit]
    azimuth, zenith, energy = events["azimuth"], events["zenith"], events["energy"]  # views
    has_angles = (np.abs(azimuth) < 6.284) & (zenith >= 0) & (zenith < 3.1416)
    count_bad(detector, where, events["event_id"], {
        "events without angles in radians": ~has_angles, HARMLESS[1]: ~(energy > 0)})
    azimuth[~has_angles] = zenith[~has_angles] = energy[~(energy > 0)] = np.nan
    azimuth_sign, zenith_sign = READINGS[config.reading]  # ours point to the source
    azimuth[:] = (azimuth + math.pi * (azimuth_sign == 1)) % (2 * math.pi)
    zenith[:] = np.abs(math.pi * (zenith_sign == 1) - zenith)  # float32's pi is larger

    first = time[np.diff(event, prepend=-1) > 0]
    rung = number_along_strings(detector.position, detector.string)
    near = local_coincidence(event, rung[dom], time - first[event])
    hlc = near if hlc is None else hlc[order][good]  # not every table has it
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
    add_sums(sums, n, first, *columns, detector.position)
    use = np.add.reduceat(~aux, first, dtype=np.int64) >= MIN_PULSES
    use &= sums["line_fit"].any(axis=1) & (events["event_class"] != 2) & (events["zenith"] >= 0)
    x, y, z = sums["line_fit"][use].T
    azimuth, zenith = events["azimuth"][use], events["zenith"][use]
    level = (x * np.cos(azimuth) + y * np.sin(azimuth)) * np.sin(zenith)
    return np.array([len(z), level.sum(), (z * np.cos(zenith)).sum()])

def check_angles(config, light):
    """Print whether the light confirms the option; with "auto" it must."""
    n, level, upright = light
    is_sure = abs(level) > math.sqrt(2 * n) and abs(upright) > math.sqrt(n)  # 3 sigma
    signs = np.sign([level, upright]) * READINGS[config.reading]
    right = [name for name in READINGS if is_sure and READINGS[name] == tuple(signs)]
    text = f"angles = {config.reading!r}: the light of {n:,.0f} tracks "
    text += "contradicts it" if is_sure else "does not say whether it is right"
    advice = f"; convert again with --angles={' or '.join(right or READINGS)}"
    if right == [config.reading]:
        print0(f"angles = {config.reading!r}: confirmed by the light of {n:,.0f} tracks")
    elif config.angles == "auto":
        fail(text + advice)
    else:
        print0(f"warning: {text}{advice} and another out_dir" if is_sure else text)

# ---- the folder ---------------------------------------------------------------------------------

def is_complete(config) -> bool:
    """Return whether an earlier run wrote out_dir; refuse other options."""
    record = Path(config.out_dir, "converted.json")
    before = json.loads(record.read_text()) if record.exists() else {}
    now = asdict(config) | {"out_dir": before.get("out_dir")}
    differ = [f"{name} = {before.get(name)!r}" for name in now if before.get(name) != now[name]]
    if differ and record.parent.exists():
        fail(f"{config.out_dir}: made with {', '.join(differ)}; choose another out_dir")
    if before:
        print0(f"{config.out_dir} is complete, nothing to do\n{before['next']}")
    return bool(before)

def convert(config, detector, splits, n_events):
    """Write out_dir from {split: results of make_events}: out_dir.part until the end."""
    folder, ranges, number = Path(f"{Path(config.out_dir)}.part"), {}, 0
    n_lit, n_pulses, light = 0, 0, 0
    with lock_folder(folder), progress_bar(n_events, "event") as bar:
        shutil.rmtree(folder / "train", ignore_errors=True)  # of a stopped run
        rows = enumerate(zip(*detector.position.T.tolist(), detector.string.tolist()))
        text = "".join(f"{dom},{x},{y},{z},{string}\n" for dom, (x, y, z, string) in rows)
        (folder / "sensor_geometry.csv").write_text(f"sensor_id,x,y,z,string\n{text}")
        with pq.ParquetWriter(folder / "train_meta.parquet", META_SCHEMA) as meta:
            for split, chunks in splits.items():
                first = number + 1
                for events, pulses in collect(chunks, config.events_per_batch):
                    number += 1
                    ranges[split] = first, number
                    events["batch_id"] = number
                    columns = [events[name] for name in META_SCHEMA.names]
                    meta.write_table(pa.table(columns, META_SCHEMA))
                    write_parquet(folder / f"train/batch_{number}.parquet", pulses, PULSE_SCHEMA,
                                  use_dictionary=["sensor_id", "charge", "event_id"])
                    light += compare_light(detector, events, pulses)
                    n_lit, n_pulses = n_lit + len(events), n_pulses + len(pulses)
                    bar.update(len(events))
    refuse_bad(detector, 0.01)
    if not number:
        fail(f"none of {n_events:,} events has light")
    check_angles(config, light)
    if list(ranges) == ["pretrain"] and number > 1:  # val: the last tenth
        end = number - math.ceil(number / 10)
        ranges = {"pretrain": (1, end), "val": (end + 1, number)}
    data_dir = config.out_dir.removesuffix("_raw")
    data_dir += "_prepared" if data_dir == config.out_dir else ""
    folders = shlex.join([f"--input_dir={config.out_dir}", f"--data_dir={data_dir}"])
    command = f'next: python prepare.py {folders} --splits="{ranges}"'
    write_json(folder / "converted.json", asdict(config) | {"next": command})
    folder.rename(config.out_dir)
    print0(f"{config.out_dir}: {number} batches, {n_lit:,} events, {n_pulses:,} pulses; left out "
           f"or NaN: {n_events - n_lit:,} events without light"
           + "".join(f", {n:,} {what}" for what, (n, *_) in detector.bad.items() if n))
    print0(command)
