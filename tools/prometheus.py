"""Prometheus' photon files (parquet, IceCube-86) -> event files in the Kaggle layout, which prepare.py reads.

    python -m tools.prometheus --input_dir=photons --geometry=data/kaggle/sensor_geometry.csv
    python -m tools.prometheus sample_config/prometheus.py --angles=zenith_flight    # see below
    python prepare.py sample_config/prometheus_prepare.py                            # then go on

Prints a bar over the events, what was written, and the command to go on with. The bytes are the same for any
number of workers. A run that was stopped goes on from its finished files; a complete folder is left as it is.

So that a model pretrained on Kaggle's events can be fine-tuned on these, and the other way round: photons of
a DOM that come close together are one pulse, 1 p.e. each; aux is the rule of local coincidence that
simulate.py follows too; each event is shifted so that its first local coincidence lies near 10,000 ns, where
Kaggle's trigger lies. Not added: noise, the spread of charges, the trigger itself.

Versions of Prometheus disagree on which way the angles point. --angles says it: both along the flight, both
to the source, or only the zenith or only the azimuth along the flight. Each file is checked: a line fit to
the good pulses (position = position_0 + velocity * time) moves along the flight, at least for tracks; the
momentum of the final states lies along it too. If they contradict the knob, a warning says what is right.
"""
import math
import os
import shutil
import sys
import zlib
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from common import (check_settings, count_cores, count_events, fail, hold_lock, progress_bar,
                    read_json, run_in_workers, run_stage, write_atomic, write_json)
from data import uniform_hash
from knobs import check_choice, check_not_negative, check_positive, load_config, print_knobs
from prepare import (CHUNK, ICECUBE_DOMS_PER_STRING, KINDS, MAX_FLOAT, open_parquet, read_batches,
                     read_detector, refuse, refuse_outside, to_numpy)
from simulate import (META_SCHEMA, PULSE_SCHEMA, TRIGGER_AT, TRIGGER_SHAKE, batch_paths, join_meta,
                      local_coincidence, number_along_strings, unit_vector)

SURFACE_Z = -1948.07  # [m] z of IceCube's centre for Prometheus, which counts from the surface
MAX_TIME = 1e6  # [ns] no light of an event is this late
ROWS_PER_FILE = 10_000_000  # event_id = this * number of the file, from 1 in sorted order, + row in it
MIN_PULSES = 8  # good ones, for a line fit that is worth asking
# what angles can mean: does (azimuth, zenith) point along the flight (1) or back to the source (-1)?
READINGS = {"flight": (1, 1), "source": (-1, -1), "zenith_flight": (-1, 1), "azimuth_flight": (1, -1)}


@dataclass
class PrometheusConfig:
    input_dir: str = "data/prometheus_photons"  # folder of photon files, *.parquet
    geometry: str = "data/kaggle/sensor_geometry.csv"  # with sensor_id,x,y,z, as Kaggle's; copied to out_dir
    out_dir: str = "data/prometheus_raw"  # folder to write
    events_per_batch: int = 10_000  # at most, per file to write: small files share one, large ones are cut
    merge_window: float = 3.3  # [ns] photons this close are one pulse: a 300 MHz sample, 0810.4930; 0 = none
    angles: str = "flight"  # in the files: flight, source, zenith_flight or azimuth_flight, see above
    seed: int = 0  # of the 300 ns by which the first coincidence is off 10,000 ns
    workers: int = 0  # processes; 0 = one per core

    def check(self):
        yield from check_positive(self, "events_per_batch")
        yield from check_not_negative(self, "merge_window", "seed", "workers")
        yield from check_choice(self, "angles", list(READINGS))


# ------------------------------------------------------------------------------
# plan: which files make up which batches
# ------------------------------------------------------------------------------

PHOTONS = {**{f"mc_truth.initial_state_{name}": "number" for name in ("energy", "azimuth", "zenith")},
           **{f"photons.{name}": "list of integers" for name in ("string_id", "sensor_id")},
           **{f"photons.{name}": "list of numbers"
              for name in ("t", "sensor_pos_x", "sensor_pos_y", "sensor_pos_z")}}
FINAL_STATES = {f"mc_truth.final_state_{name}": "list of numbers"  # optional
                for name in ("energy", "azimuth", "zenith", "type")}


def list_of(is_kind):
    return lambda kind: (pa.types.is_list(kind) or pa.types.is_large_list(kind)) and is_kind(kind.value_type)


def open_photons(path):
    lists = {"list of integers": list_of(KINDS["integer"]), "list of numbers": list_of(KINDS["number"])}
    return open_parquet(path, PHOTONS, FINAL_STATES, KINDS | lists)


def plan_groups(files, events_per_batch):
    """Neighbouring files of so many events at most, or a large one -> lists of (number, path, events)."""
    groups, n_events = [], math.inf
    for number, path in enumerate(files, start=1):
        n_rows = open_photons(path)[0].metadata.num_rows
        if n_events + n_rows > events_per_batch:
            groups.append([])
            n_events = 0
        groups[-1].append((number, path, n_rows))
        n_events += n_rows
    return groups


# ------------------------------------------------------------------------------
# read: photons and what caused them
# ------------------------------------------------------------------------------

def read_photons(path, detector):
    """Yield some events at a time: row of the first, truth (dict); of each photon event (0..n-1), dom, time.

    The truth: energy, azimuth, zenith (n,) as in the file; momentum (n, 3), event_class (n,) of final states.
    """
    file, columns = open_photons(path)
    meta = file.metadata
    leaf = [meta.schema.column(i).path.startswith("photons.t.") for i in range(len(meta.schema))].index(True)
    n_photons = sum(meta.row_group(i).column(leaf).num_values for i in range(meta.num_row_groups))
    n_rows = max(1, CHUNK * meta.num_rows // max(n_photons, meta.num_rows, 1))
    for row, table in read_batches(file, path, columns, n_rows):
        arrays = {f"{parent}.{child.name}": array for parent in ("mc_truth", "photons") for child, array in
                  zip(table.schema.field(parent).type, table.column(parent).flatten())}

        def items(name, like):
            """Items of a column of lists, which must be as long as those of like -> items, event of each."""
            n, wanted = (arrays[key].value_lengths().fill_null(0).to_numpy() for key in (name, like))
            refuse(n != wanted, path, row, lambda i: f"{name} is longer or shorter than {like}; make it anew")
            return to_numpy(arrays[name].flatten(), path, row, name), np.repeat(np.arange(len(n)), n)

        truth = {}
        for name, low, high in (("energy", 0, MAX_FLOAT), ("azimuth", -6.284, 6.284), ("zenith", 0, 3.142)):
            column = f"mc_truth.initial_state_{name}"
            truth[name] = to_numpy(arrays[column], path, row, column)
            refuse_outside(truth[name], low, high, path, row, column)
        truth |= read_final_states(len(table), columns, items)

        time, event = items("photons.t", "photons.t")
        string, sensor, *position = (items(f"photons.{name}", "photons.t")[0] for name in (
            "string_id", "sensor_id", "sensor_pos_x", "sensor_pos_y", "sensor_pos_z"))
        bad = ~((time >= 0) & (time <= MAX_TIME))
        if bad.any():
            fail(f"{path}: row {row + event[bad][0]}: a photon's t is {time[bad][0]}, must lie in "
                 f"0..{MAX_TIME:g}; make it anew")
        known = (string >= 1) & (string <= len(detector) // ICECUBE_DOMS_PER_STRING)
        known &= (sensor >= 1) & (sensor <= ICECUBE_DOMS_PER_STRING)
        dom = np.where(known, (string - 1) * ICECUBE_DOMS_PER_STRING + sensor - 1, 0)
        expected = detector.position[:, dom] + [[0], [0], [SURFACE_Z]]
        bad = ~(known & (np.abs(np.array(position) - expected) < 1).all(axis=0))  # [m]
        if bad.any():
            i = int(np.argmax(bad))
            by_file = ", ".join(f"{x:.2f}" for x in expected[:, i]) if known[i] else "nowhere"
            fail(f"{path}: row {row + event[i]}: string {string[i]} sensor {sensor[i]} lies at "
                 f"{', '.join(f'{x[i]:.2f}' for x in position)}, by the geometry file {by_file}; this is "
                 "another detector, only IceCube-86 can be converted")
        yield row, truth, event, dom, time


def read_final_states(n, columns, items):
    """momentum (n, 3), zero if unknown; event_class (n,): 1 with a muon, 0 unknown or a tau, else 2."""
    momentum, event_class = np.zeros((n, 3)), np.zeros(n, np.uint8)
    energy, azimuth, zenith, kind = FINAL_STATES
    if {energy, azimuth, zenith} <= set(columns):
        values, event = items(energy, energy)
        along = unit_vector(items(azimuth, energy)[0], items(zenith, energy)[0]).T
        np.add.at(momentum, event, values[:, None] * along)
    if kind in columns:
        values, event = items(kind, kind)
        has_any, has_muon, has_tau = (np.bincount(event[found], minlength=n) > 0 for found in (
            slice(None), np.abs(values) == 13, np.abs(values) == 15))  # numbers of the Particle Data Group
        event_class[has_any & ~has_tau] = 2
        event_class[has_muon] = 1
    return {"momentum": momentum, "event_class": event_class}


# ------------------------------------------------------------------------------
# photons -> pulses
# ------------------------------------------------------------------------------

def photons_to_pulses(event, dom, time, window):
    """Photons -> pulses (event, dom, time, charge), by event and time. A pulse lasts `window` at most.

    Each round finds one pulse of every DOM that has photons left: most have few, so few DOMs see many rounds.
    """
    order = np.lexsort((time, dom, event))
    event, dom, time = event[order], dom[order], time[order]
    is_other_dom = (np.diff(event, prepend=-1) != 0) | (np.diff(dom, prepend=-1) != 0)
    is_new = is_other_dom | (np.diff(time, prepend=-np.inf) > window) | (window == 0)
    # photons of different groups never merge
    group, rest = np.cumsum(is_new), np.arange(len(time))
    while len(rest):
        first = np.diff(group[rest], prepend=0) != 0
        is_new[rest[first]] = True
        rest = rest[time[rest] - time[rest[first]][np.cumsum(first) - 1] > window]
    first = np.flatnonzero(is_new)
    charge = np.diff(first, append=len(time)).astype(np.float64)  # photons carry none: 1 p.e. each
    order = np.lexsort((time[first], event[first]))
    return event[first][order], dom[first][order], time[first][order], charge[order]


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


def find_reading(light, momentum):
    """flight_cosines of the line fits and of the momenta of a file -> name of the reading, and who tells it.

    Each reading scores the sum of -ln(chance that a random direction lies as near to the fit); the best must
    beat the second by 3 standard deviations. The light of cascades does not tell; then the momentum may.
    """
    light, names = light[:, light.any(axis=0)], list(READINGS)
    score = -np.log((1 - light) / 2 + 1e-3).sum(axis=1)  # 1e-3: a fit is not better than 4 degrees
    second, best = np.argsort(score)[-2:]
    n = light.shape[1]
    if n >= 3 and score[best] - score[second] > 3 * math.sqrt(2 * n):
        return names[best], "light"
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
# what a worker does with a group of files
# ------------------------------------------------------------------------------

def convert_group(config, detector, group, files):
    """Write the batches of a group of files aside -> what the main process needs to know of them."""
    pa.set_cpu_count(1)
    readings, n_lit, n_batches = [], 0, 0
    tables = convert_files(config, detector, files, readings)
    for _, pieces in groupby(cut(tables, config.events_per_batch), key=lambda piece: piece[0]):
        pulse_path, meta_path = part_paths(Path(config.out_dir), group, n_batches)
        metas = []
        write_atomic(pulse_path, lambda part: metas.append(write_pulses(part, pieces)))
        write_atomic(meta_path, lambda part: pq.write_table(metas[0], part))
        n_lit += len(metas[0])
        n_batches += 1
    n_dark = sum(n_rows for *_, n_rows in files) - n_lit
    return {"n_batches": n_batches, "n_dark": n_dark, "readings": readings}


def convert_files(config, detector, files, readings):
    """Yield tables of events and of their pulses, some events at a time; note the reading of each file."""
    rung = number_along_strings(detector)
    for number, path, _ in files:
        light, momentum = [np.zeros((len(READINGS), 0))], [np.zeros((len(READINGS), 0))]
        for row, truth, event, dom, time in read_photons(path, detector):
            count_events(len(truth["energy"]))
            lit, event = np.unique(event, return_inverse=True)  # the others have nothing to learn from
            truth = {name: values[lit] for name, values in truth.items()}
            event, dom, time, charge = photons_to_pulses(event, dom, time, config.merge_window)
            aux = ~local_coincidence(event, rung[dom], time)

            label = unit_vector(truth["azimuth"], truth["zenith"]).T
            velocity = fit_velocity(len(lit), event[~aux], detector.position[:, dom[~aux]], time[~aux])
            light.append(flight_cosines(velocity, label))
            momentum.append(flight_cosines(truth.pop("momentum"), label))

            azimuth_sign, zenith_sign = READINGS[config.angles]
            if azimuth_sign == 1:  # labels point to the source
                truth["azimuth"] = truth["azimuth"] + math.pi
            if zenith_sign == 1:
                truth["zenith"] = math.pi - truth["zenith"]
            truth["azimuth"] = truth["azimuth"] % (2 * math.pi)
            event_id = number * ROWS_PER_FILE + row + lit
            time = shift_times(event, time, aux, event_id, config.seed)
            events = {"event_id": event_id, "n_pulses": np.bincount(event, minlength=len(lit)), **truth}
            pulses = [dom.astype(np.int16), time, charge, aux, event_id[event]]
            yield pa.table(events), pa.table(pulses, PULSE_SCHEMA)
        light, momentum = np.hstack(light), np.hstack(momentum)
        if light.size:  # any event with light
            readings.append((path.name, *find_reading(light, momentum)))


def cut(chunks, n_events):
    """Cut tables of events and their pulses where a batch of n_events is full; yield its number and both."""
    n_done = 0
    for events, pulses in chunks:
        while len(events):
            head = events.slice(0, n_events - n_done % n_events)
            n_pulses = head["n_pulses"].to_numpy().sum()
            yield n_done // n_events, head, pulses.slice(0, n_pulses)
            events, pulses = events.slice(len(head)), pulses.slice(n_pulses)
            n_done += len(head)


def write_pulses(path, pieces):
    """Write a batch file -> its rows of the meta table, whose batch_id is still 0."""
    events = []
    with pq.ParquetWriter(path, PULSE_SCHEMA, use_dictionary=["sensor_id", "charge", "event_id"]) as writer:
        for _, part, pulses in pieces:
            writer.write_table(pulses)
            events.append(part)
    events = pa.concat_tables(events)
    n = events["n_pulses"].to_numpy()
    end = np.cumsum(n)
    places = {"batch_id": np.zeros_like(n), "first_pulse_index": end - n, "last_pulse_index": end - 1}
    columns = places | {name: events[name] for name in events.column_names}
    return pa.table([columns[name] for name in META_SCHEMA.names], META_SCHEMA)


# ------------------------------------------------------------------------------
# main
# ------------------------------------------------------------------------------

def part_paths(out_dir, group, k):
    """Where batch k of a group waits for its number: those before it are not known until all are written."""
    return [out_dir / ".parts" / f"group_{group}_{k}_{kind}.parquet" for kind in ("pulses", "meta")]


def number_batches(out_dir, results):
    """Move the batches of all groups to train/, numbered from 1 without gaps -> paths of meta tables."""
    (out_dir / "train").mkdir(exist_ok=True)
    metas = []
    for group, result in enumerate(results):
        for k in range(result["n_batches"]):
            pulse_part, meta_part = part_paths(out_dir, group, k)
            pulse_path, meta_path = batch_paths(out_dir, "train", len(metas) + 1)
            if pulse_part.exists():  # else a run that was stopped has moved it
                meta = pq.read_table(meta_part)
                meta = meta.set_column(0, META_SCHEMA.field(0), [np.full(len(meta), len(metas) + 1)])
                write_atomic(meta_path, lambda part: pq.write_table(meta, part))
                os.replace(pulse_part, pulse_path)
            metas.append(meta_path)
    return metas


def print_next_command(out_dir, n_batches):
    n_val = math.ceil(n_batches / 10)
    splits = {"pretrain": (1, n_batches - n_val), "val": (n_batches - n_val + 1, n_batches)}
    if n_batches == 1:
        splits = {"val": (1, 1)}
        print("one batch cannot be split: for training as well, use a smaller --events_per_batch")
    print(f"to go on, run: python prepare.py --input_dir={out_dir} --data_dir=data/prometheus "
          f'--splits="{splits}"')


def main():
    config = load_config(PrometheusConfig, __doc__)
    out_dir, input_dir = Path(config.out_dir), Path(config.input_dir)
    detector = read_detector(Path(config.geometry))
    files = sorted(input_dir.glob("*.parquet"))
    if not files:
        fail(f"{input_dir}: holds no .parquet files; input_dir is the folder of Prometheus' photon files")
    groups = plan_groups(files, config.events_per_batch)

    # all that the bytes depend on
    settings = {key: value for key, value in asdict(config).items() if key not in ("out_dir", "workers")}
    names = "".join(f"{path.name} {path.stat().st_size}\n" for path in files)
    settings["input_dir"] = f"{len(files)} files, names and sizes with crc32 {zlib.crc32(names.encode()):08x}"
    settings["geometry"] = f"positions with crc32 {zlib.crc32(detector.position.astype('<f8').tobytes()):08x}"
    record, meta_path = out_dir / "prometheus.json", out_dir / "train_meta.parquet"
    if record.exists():
        found = read_json(record)
        check_settings(out_dir, found, settings, "out_dir")
        paths = [batch_paths(out_dir, "train", i + 1)[0] for i in range(found.get("n_batches", 0))]
        if paths and all(path.exists() for path in (meta_path, *paths)):
            print_readings(config, found["readings"])
            print(f"{out_dir} is complete, nothing to do")
            print_next_command(out_dir, len(paths))
            return
    elif any((out_dir / name).exists() for name in ("train", "train_meta.parquet", "sensor_geometry.csv")):
        fail(f"{out_dir} holds data that tools.prometheus did not write; choose another --out_dir")

    lock = hold_lock(out_dir)  # held until main() ends
    print_knobs(config)
    write_json(record, settings)
    write_atomic(out_dir / "sensor_geometry.csv", lambda part: shutil.copyfile(config.geometry, part))
    records = [out_dir / ".parts" / f"group_{group}.json" for group in range(len(groups))]
    todo = [group for group, path in enumerate(records) if not path.exists()]
    n_events = [sum(n_rows for *_, n_rows in group) for group in groups]
    n_left = sum(n_events[group] for group in todo)
    with progress_bar(sum(n_events), "prometheus", "event", initial=sum(n_events) - n_left) as bar:
        run_in_workers(convert_group, [(config, detector, group, groups[group]) for group in todo],
                       max(1, min(config.workers or count_cores(), len(todo))), bar,
                       lambda job, result: write_json(records[job[2]], result))

    results = [read_json(path) for path in records]
    metas = number_batches(out_dir, results)
    if not metas:
        fail(f"{input_dir}: no event with light in {len(files)} files; nothing to prepare")
    lengths = join_meta(meta_path, META_SCHEMA, metas)
    readings = {}
    for name, reading, teller in (entry for result in results for entry in result["readings"]):
        readings.setdefault((reading, teller), []).append(name)
    readings = [(*key, len(names), names[0]) for key, names in readings.items()]
    n_dark = sum(result["n_dark"] for result in results)
    print(f"{out_dir / 'train'}: {len(metas)} files, {len(lengths):,} events, {lengths.sum():,} pulses, "
          f"median {np.median(lengths):.0f} an event; {n_dark:,} events without a photon were left out")
    print_readings(config, readings)
    write_json(record, settings | {"n_batches": len(metas), "readings": readings})
    shutil.rmtree(out_dir / ".parts")
    print_next_command(out_dir, len(metas))


if __name__ == "__main__":
    run_stage(main)
