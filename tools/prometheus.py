"""Prometheus' photon files (parquet) -> event files in the Kaggle layout, which prepare.py reads.

    python -m tools.prometheus --input_dir=photons --geometry=data/kaggle/sensor_geometry.csv
    python -m tools.prometheus sample_config/prometheus.py --angles=zenith_flight    # see below
    python prepare.py sample_config/prometheus_prepare.py                            # then go on

Prints a bar over the events, what was written, and the command to go on with. The bytes are the same for any
number of workers. A run that was stopped goes on from its finished files; a complete folder is left as it is.

So that a model pretrained on Kaggle's events can be fine-tuned on these, and the other way round: photons of
a DOM that come close together are one pulse, 1 p.e. each; aux is the rule of local coincidence that
simulate.py follows too; each event is shifted so that its first local coincidence lies near 10,000 ns, where
Kaggle's trigger lies. Not added: noise, the spread of charges, the trigger itself. DOMs are found by their
position, in IceCube or, with the table that GraphNeT has of it (parquet, csv), any other detector.

Versions of Prometheus disagree on which way the angles point. --angles says it: both along the flight, both
to the source, or only the zenith or only the azimuth along the flight. Each file is checked: a line fit to
the good pulses (position = position_0 + velocity * time) moves along the flight, at least for tracks; the
momentum of the final states lies along it too. If they contradict the knob, a warning says what is right.
"""
import math
import os
import shutil
import zlib
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from common import (count_cores, count_events, fail, hold_lock, progress_bar, read_json, run_in_workers,
                    run_stage, write_atomic, write_json)
from knobs import check_choice, check_not_negative, check_positive, load_config, print_knobs
from simulate import (META_SCHEMA, batch_paths, describe_geometry, join_meta, local_coincidence,
                      number_along_strings, unit_vector, write_detector)
from tables import CHUNK, KINDS, MAX_FLOAT, open_parquet, read_batches, refuse, refuse_outside, to_numpy
from tools.layout import (MAX_TIME, MIN_ENERGY, READINGS, describe_place, event_tables, find_doms,
                          find_reading, find_record, flight_cosines, print_next_command, print_readings,
                          print_summary, read_doms, score_readings, write_pulses)

ROWS_PER_FILE = 10_000_000  # event_id = this * number of the file, from 1 in sorted order, + row in it


@dataclass
class PrometheusConfig:
    input_dir: str = "data/prometheus_photons"  # folder of photon files, *.parquet
    geometry: str = "data/kaggle/sensor_geometry.csv"  # with sensor_id,x,y,z; or a table of GraphNeT's
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
           **{f"photons.{name}": "list of numbers"
              for name in ("t", "sensor_pos_x", "sensor_pos_y", "sensor_pos_z")}}
FINAL_STATES = {f"mc_truth.final_state_{name}": "list of numbers"  # optional
                for name in ("energy", "azimuth", "zenith", "type")}


def list_of(is_kind):
    return lambda kind: (pa.types.is_list(kind) or pa.types.is_large_list(kind)) and is_kind(kind.value_type)


def open_photons(path):
    return open_parquet(path, PHOTONS, FINAL_STATES, KINDS | {"list of numbers": list_of(KINDS["number"])})


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

def read_photons(path, places, n_doms):
    """Yield some events at a time: row of the first, truth (dict); of each photon event (0..n-1), dom, time.

    The truth: energy, azimuth, zenith (n,) as in the file; momentum (n, 3), event_class (n,) of final states.
    places: of the DOMs, see read_doms.
    """
    file, columns = open_photons(path)
    known = {}  # positions and their DOMs
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
        for name, low, high in (("energy", MIN_ENERGY, MAX_FLOAT), ("azimuth", -6.284, 6.284),
                                ("zenith", 0, 3.142)):
            column = f"mc_truth.initial_state_{name}"
            truth[name] = to_numpy(arrays[column], path, row, column)
            refuse_outside(truth[name], low, high, path, row, column)
        truth |= read_final_states(len(table), columns, items)

        time, event = items("photons.t", "photons.t")
        position = np.array([items(f"photons.sensor_pos_{axis}", "photons.t")[0] for axis in "xyz"])
        bad = ~((time >= 0) & (time <= MAX_TIME))
        if bad.any():
            fail(f"{path}: row {row + event[bad][0]}: a photon's t is {time[bad][0]}, must lie in "
                 f"0..{MAX_TIME:g}; make it anew")
        dom = find_doms(position, places, n_doms, known)
        if len(dom) and dom.min() < 0:
            i = int(dom.argmin())
            fail(f"{path}: row {row + event[i]}: a photon was seen {describe_place(position[:, i], places)}")
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


# ------------------------------------------------------------------------------
# what a worker does with a group of files
# ------------------------------------------------------------------------------

def convert_group(config, detector, places, group, files):
    """Write the batches of a group of files aside -> what the main process needs to know of them."""
    pa.set_cpu_count(1)
    readings, n_lit, n_batches = [], 0, 0
    tables = convert_files(config, detector, places, files, readings)
    for _, pieces in groupby(cut(tables, config.events_per_batch), key=lambda piece: piece[0]):
        pulse_path, meta_path = part_paths(Path(config.out_dir), group, n_batches)
        metas = []
        write_atomic(pulse_path, lambda part: metas.append(write_pulses(part, (both for _, *both in pieces))))
        write_atomic(meta_path, lambda part: pq.write_table(metas[0], part))
        n_lit += len(metas[0])
        n_batches += 1
    n_dark = sum(n_rows for *_, n_rows in files) - n_lit
    return {"n_batches": n_batches, "n_dark": n_dark, "readings": readings}


def convert_files(config, detector, places, files, readings):
    """Yield tables of events and of their pulses, some events at a time; note the reading of each file."""
    rung = number_along_strings(detector)
    for number, path, _ in files:
        light, momentum = [np.zeros((len(READINGS), 0))], [np.zeros((len(READINGS), 0))]
        for row, truth, event, dom, time in read_photons(path, places, len(detector)):
            count_events(len(truth["energy"]))
            lit, event = np.unique(event, return_inverse=True)  # the others have nothing to learn from
            truth = {name: values[lit] for name, values in truth.items()}
            label = unit_vector(truth["azimuth"], truth["zenith"]).T
            momentum.append(flight_cosines(truth.pop("momentum"), label))
            event, dom, time, charge = photons_to_pulses(event, dom, time, config.merge_window)
            aux = ~local_coincidence(event, rung[dom], time)
            event_id = number * ROWS_PER_FILE + row + lit
            events, pulses, cosines = event_tables(config, detector, event_id, truth, event, dom, time,
                                                   charge, aux)
            light.append(cosines)
            yield events, pulses
        light, momentum = np.hstack(light), np.hstack(momentum)
        if light.size:  # any event with light
            readings.append((path.name, *find_reading(score_readings(light), momentum)))


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


def split_batches(n):
    if n == 1:
        print("one batch cannot be split: for training as well, use a smaller --events_per_batch and another "
              "--out_dir")
        return {"val": (1, 1)}
    n_val = math.ceil(n / 10)
    return {"pretrain": (1, n - n_val), "val": (n - n_val + 1, n)}


def main():
    config = load_config(PrometheusConfig, __doc__)
    out_dir, input_dir = Path(config.out_dir), Path(config.input_dir)
    detector, places = read_doms(Path(config.geometry))
    files = sorted(input_dir.glob("*.parquet"))
    if not files:
        fail(f"{input_dir}: holds no .parquet files; input_dir is the folder of Prometheus' photon files")
    groups = plan_groups(files, config.events_per_batch)

    # all that the bytes depend on
    settings = {key: value for key, value in asdict(config).items() if key not in ("out_dir", "workers")}
    names = "".join(f"{path.name} {path.stat().st_size}\n" for path in files)
    settings["input_dir"] = f"{len(files)} files, names and sizes with crc32 {zlib.crc32(names.encode()):08x}"
    settings["geometry"] = describe_geometry(detector)
    record = out_dir / "prometheus.json"
    found = find_record(record, settings, "tools.prometheus")
    if found:
        print_readings(config, found["readings"])
        print(f"{out_dir} is complete, nothing to do")
        print_next_command(out_dir, split_batches(found["n_batches"]))
        return

    lock = hold_lock(out_dir)  # held until main() ends
    print_knobs(config)
    write_json(record, settings)
    write_detector(out_dir, detector)
    records = [out_dir / ".parts" / f"group_{group}.json" for group in range(len(groups))]
    todo = [group for group, path in enumerate(records) if not path.exists()]
    n_events = [sum(n_rows for *_, n_rows in group) for group in groups]
    n_left = sum(n_events[group] for group in todo)
    with progress_bar(sum(n_events), "prometheus", "event", initial=sum(n_events) - n_left) as bar:
        run_in_workers(convert_group, [(config, detector, places, group, groups[group]) for group in todo],
                       max(1, min(config.workers or count_cores(), len(todo))), bar,
                       lambda job, result: write_json(records[job[3]], result))

    results = [read_json(path) for path in records]
    metas = number_batches(out_dir, results)
    if not metas:
        fail(f"{input_dir}: no event with light in {len(files)} files; nothing to prepare")
    lengths = join_meta(out_dir / "train_meta.parquet", META_SCHEMA, metas)
    readings = {}
    for name, reading, teller in (entry for result in results for entry in result["readings"]):
        readings.setdefault((reading, teller), []).append(name)
    readings = [(*key, len(names), names[0]) for key, names in readings.items()]
    n_dark = sum(result["n_dark"] for result in results)
    print_summary(out_dir, len(metas), lengths, n_dark, "photon")
    print_readings(config, readings)
    write_json(record, settings | {"n_batches": len(metas), "readings": readings})
    shutil.rmtree(out_dir / ".parts")
    print_next_command(out_dir, split_batches(len(metas)))


if __name__ == "__main__":
    run_stage(main)
