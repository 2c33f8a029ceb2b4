"""What tools/prometheus.py and tools/graphnet.py share: from pulses and truth to files in the Kaggle layout.

Nothing to run here. Where the DOMs lie; times and labels; which way the angles point; batch files; the record
of a run.
"""
import math
import shlex
import sys

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

from common import check_settings, fail, first_line, read_json
from data import uniform_hash
from simulate import (META_SCHEMA, PULSE_SCHEMA, TRIGGER_AT, TRIGGER_SHAKE, batch_paths, check_sensor_ids,
                      unit_vector)
from tables import KINDS, Detector, read_detector, refuse, to_numpy

SURFACE_Z = -1948.07  # [m] z of IceCube's centre for Prometheus, which counts from the surface
MAX_TIME = 1e6  # [ns] no light of an event is this late
MIN_PULSES = 8  # good ones, for a line fit that is worth asking
MIN_ENERGY = 1e-9  # [GeV] above 0, as prepare.py demands

# what angles can mean: does (azimuth, zenith) point along the flight (1) or back to the source (-1)?
READINGS = {"flight": (1, 1), "source": (-1, -1), "zenith_flight": (-1, 1), "azimuth_flight": (1, -1)}


# ------------------------------------------------------------------------------
# where the DOMs lie
# ------------------------------------------------------------------------------

def read_table(path, what):
    """A table from a parquet or csv file. what: says what the file must be, if there is none."""
    if not path.is_file():
        fail(f"{path}: no such file; {what}")
    try:
        return pa.csv.read_csv(path) if path.suffix == ".csv" else pq.read_table(path)
    except (pa.ArrowException, OSError) as error:
        fail(f"{path}: not a readable table ({first_line(error)}); get it anew")


def read_doms(path):
    """Kaggle's sensor_geometry.csv, or a table of GraphNeT's (parquet, csv) -> Detector, places (3, n) [m].

    Places are where the events may have the DOMs: DOM k lies at place k, k + V, ... GraphNeT's tables and
    Prometheus count depth from elsewhere; the Detector's z is counted from the middle, as Kaggle's is.
    """
    table = read_table(path, "geometry is Kaggle's sensor_geometry.csv or a table of GraphNeT's")
    names = [[f"{kind}{axis}" for axis in "xyz"] for kind in ("sensor_pos_", "dom_")]
    names = next((three for three in names if set(three) <= set(table.column_names)), None)
    if names is None and path.suffix == ".csv":
        detector = read_detector(path)
        below = detector.position + [[0], [0], [SURFACE_Z]]
        places = np.hstack([detector.position, below])
    else:
        detector, places = read_graphnet_table(path, table, names)
    check_sensor_ids(detector, path)
    return detector, places


def read_graphnet_table(path, table, names):
    string = next((name for name in ("sensor_string_id", "string") if name in table.column_names), None)
    if names is None or string is None:
        fail(f"{path}: needs the columns sensor_pos_x, _y, _z, sensor_string_id or dom_x, _y, _z, string; it "
             f"has {', '.join(table.column_names)}")
    for name in (*names, string):
        if not KINDS["number"](table[name].type):
            fail(f"{path}: column {name} is of type {table[name].type}, need number; get it anew")
    *places, string = (to_numpy(table[name].combine_chunks(), path, 0, name) for name in (*names, string))
    places = np.array(places, np.float64)
    refuse(~np.isfinite(places).all(axis=0), path, 0, lambda i: "a position is not finite; get it anew")
    if places.shape[1] == 0:
        fail(f"{path}: has no rows; get it anew")
    if len(np.unique(places, axis=1).T) < places.shape[1]:
        fail(f"{path}: some rows have equal places; need one row per DOM, or per module of several tubes")
    middle = (places[2].min() + places[2].max()) / 2
    for center in (0, SURFACE_Z):  # IceCube's centre is not quite in the middle of its DOMs
        if abs(middle - center) < 50:
            middle = center
    position = np.stack([*places[:2], np.round(places[2] - middle, 4)])
    return Detector(position, np.unique(string, return_inverse=True)[1].ravel()), places


def find_doms(position, places, n_doms, known):
    """Positions (3, n) -> DOMs (n,), -1 where none lies within 1 m. known: dict of what was found before."""
    # a number for each position: two DOMs with the same one would be a coincidence of 13 digits
    keys, first, inverse = np.unique(position[0] + math.pi * position[1] + math.e * position[2],
                                     return_index=True, return_inverse=True)
    doms = []
    for key, i in zip(keys.tolist(), first.tolist()):
        if key not in known:
            apart = np.linalg.norm(places - position[:, i, None], axis=0)
            known[key] = int(apart.argmin()) % n_doms if apart.min() < 1 else -1
        doms.append(known[key])
    return np.array(doms, np.int64)[inverse.ravel()]


def describe_place(position, places):
    apart = np.linalg.norm(places - position[:, None], axis=0).min()
    return (f"at {', '.join(f'{x:.2f}' for x in position)}, where the geometry has no DOM (the nearest is "
            f"{apart:.1f} m away); it belongs to another detector, choose another --geometry and --out_dir")


# ------------------------------------------------------------------------------
# pulses and truth -> what the files hold
# ------------------------------------------------------------------------------

def event_tables(config, detector, event_id, truth, event, dom, time, charge, aux):
    """n events -> tables of events and of their pulses; what the light says of the angles (flight_cosines).

    truth: dict of azimuth, zenith as in the source, energy, event_class (n,). The columns of pulses are by
    event (0..n-1, each has one) and time [ns].
    """
    velocity = fit_velocity(len(event_id), event[~aux], detector.position[:, dom[~aux]], time[~aux])
    light = flight_cosines(velocity, unit_vector(truth["azimuth"], truth["zenith"]).T)
    azimuth_sign, zenith_sign = READINGS[config.angles]
    azimuth, zenith = truth["azimuth"], truth["zenith"]
    if azimuth_sign == 1:  # labels point to the source
        azimuth = azimuth + math.pi
    if zenith_sign == 1:
        zenith = np.maximum(math.pi - zenith, 0)  # pi as float32 is larger
    truth = truth | {"azimuth": azimuth % (2 * math.pi), "zenith": zenith}
    time = shift_times(event, time, aux, event_id, config.seed)
    events = {"event_id": event_id, "n_pulses": np.bincount(event, minlength=len(event_id)), **truth}
    pulses = [dom.astype(np.int16), time, charge, aux, event_id[event]]
    return pa.table(events), pa.table(pulses, PULSE_SCHEMA), light


def shift_times(event, time, aux, event_id, seed):
    """Times [ns, integer] with each event's first local coincidence, or else its first pulse, near 10,000.

    Pulses are by event (0..n-1, each has one) and time. No pulse is put before 0: that event is shifted less.
    """
    first = time[np.flatnonzero(np.diff(event, prepend=-1))]
    start, good = first.copy(), np.flatnonzero(~aux)[::-1]
    start[event[good]] = time[good]  # the last value of an event stays: the earliest
    shake = np.rint(TRIGGER_SHAKE * (2 * uniform_hash(seed, event_id, 0) - 1))
    return np.rint(time + np.maximum(TRIGGER_AT + shake - start, -first)[event]).astype(np.int64)


# ------------------------------------------------------------------------------
# which way do the angles point?
# ------------------------------------------------------------------------------

def flight_cosines(vector, label):
    """Cosines (4, n) of vectors (n, 3) and the flight by each of READINGS of labels (n, 3); no vector: 0."""
    signs = np.array([(azimuth, azimuth, zenith) for azimuth, zenith in READINGS.values()])
    norm = np.maximum(np.linalg.norm(vector, axis=1), 1e-12)
    return np.einsum("ni,ni,ri->rn", vector, label, signs) / norm


def fit_velocity(n, event, position, time):
    """Line fits to the pulses of n events -> velocity (n, 3) but for a factor, 0 where they are too few."""
    count = np.bincount(event, minlength=n)
    time = time - (np.bincount(event, time, n) / np.maximum(count, 1))[event]
    velocity = np.stack([np.bincount(event, time * x, n) for x in position], axis=1)
    return np.where(count[:, None] >= MIN_PULSES, velocity, 0)


def score_readings(light):
    """flight_cosines of line fits -> number of fits, score of each reading; both add up over files.

    The score is the sum of -ln(chance that a random direction lies as near to the fit).
    """
    light = light[:, light.any(axis=0)]
    score = -np.log((1 - light) / 2 + 1e-3).sum(axis=1)  # 1e-3: a fit is not better than 4 degrees
    return [light.shape[1], *score.tolist()]


def find_reading(scores, momentum=None):
    """score_readings, and flight_cosines of momenta if known -> name of the reading, and who tells it.

    The best must beat the second by 3 standard deviations. The light of cascades does not tell; then the
    momentum may.
    """
    n, *score = scores
    names, (second, best) = list(READINGS), np.argsort(score)[-2:]
    if n >= 3 and score[best] - score[second] > 3 * math.sqrt(2 * n):
        return names[best], "light"
    if momentum is not None:
        best = int(momentum.sum(axis=1).argmax())
        if momentum[best].sum() > 0.9 * momentum.shape[1]:
            return names[best], "final states"
    return None, None


def print_readings(config, found):
    """found: [reading, who tells it, number of files, name of the first one] of each kind that occurred."""
    for reading, teller, n_files, first in found:
        files = f"{n_files} file{'s' if n_files > 1 else ''} ({first}{', ...' if n_files > 1 else ''})"
        if reading == config.angles:
            print(f"angles = {reading!r}: confirmed by the {teller} of {files}")
        elif reading is None:
            print(f"warning: neither light nor final states tell which way the angles of {files} point; "
                  f"angles = {config.angles!r} was believed", file=sys.stderr)
        else:
            print(f"warning: angles = {config.angles!r} contradicts the {teller} of {files}: wrong labels; "
                  f"remove {config.out_dir} and convert them with --angles={reading}", file=sys.stderr)


# ------------------------------------------------------------------------------
# batch files, and the record of a run
# ------------------------------------------------------------------------------

def write_pulses(path, pieces, batch=0):
    """Write a batch file from tables of events and of their pulses -> its rows of the meta table."""
    events = []
    with pq.ParquetWriter(path, PULSE_SCHEMA, use_dictionary=["sensor_id", "charge", "event_id"]) as writer:
        for part, pulses in pieces:
            writer.write_table(pulses)
            events.append(part)
    events = pa.concat_tables(events)
    n = events["n_pulses"].to_numpy()
    end = np.cumsum(n)
    places = {"batch_id": np.full_like(n, batch), "first_pulse_index": end - n, "last_pulse_index": end - 1}
    columns = places | {name: events[name] for name in events.column_names}
    return pa.table([columns[name] for name in META_SCHEMA.names], META_SCHEMA)


def find_record(record, settings, tool):
    """The record of a folder that is complete; None if there is work left. Exits if another run wrote it."""
    out_dir = record.parent
    if not record.exists():
        if any((out_dir / name).exists() for name in ("train", "train_meta.parquet", "sensor_geometry.csv")):
            fail(f"{out_dir} holds data that {tool} did not write; choose another --out_dir")
        return None
    found = read_json(record)
    check_settings(out_dir, found, settings, "out_dir")
    paths = [batch_paths(out_dir, "train", i + 1)[0] for i in range(found.get("n_batches", 0))]
    is_complete = paths and all(path.exists() for path in (out_dir / "train_meta.parquet", *paths))
    return found if is_complete else None


def print_summary(out_dir, n_batches, lengths, n_dark, what):
    print(f"{out_dir / 'train'}: {n_batches} files, {len(lengths):,} events, {lengths.sum():,} pulses, "
          f"median {np.median(lengths):.0f} an event; {n_dark:,} events without a {what} were left out")


def print_next_command(out_dir, splits):
    data_dir = str(out_dir).removesuffix("_raw")
    data_dir += "_prepared" if data_dir == str(out_dir) else ""
    splits = {name: tuple(batches) for name, batches in splits.items()}  # lists, if read from a record
    paths = shlex.join([f"--input_dir={out_dir}", f"--data_dir={data_dir}"])
    print(f'to go on, run: python prepare.py {paths} --splits="{splits}"')
