"""Photon files of Prometheus (parquet) -> the Kaggle layout, which
prepare.py reads.

    python -m tools.prometheus --input_dir=photons --geometry=data/kaggle/sensor_geometry.csv
    python -m tools.prometheus sample_config/prometheus.py --angles=zenith_flight

Prints what was written, whether the light confirms `angles`, and the next
command. Photons of a DOM within merge_window are one pulse; aux is by
local coincidence. Noise, the spread of charges and a trigger are not
added. See docs/own_data.md.
"""
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from tools.kaggle_layout import (Angles, convert, find_doms, is_complete,
                                 make_events, open_parquet, read_doms)
from utils import fail, load_config, run_main

ROWS_PER_FILE = 10_000_000  # event_id = this * number of the file (from 1) + row
EVENTS_AT_ONCE = 32  # of up to 150,000 photons
TRUTH = {name: f"mc_truth.initial_state_{name}" for name in ("energy", "azimuth", "zenith")}
FINAL_STATES = "mc_truth.final_state_type"  # optional
PHOTONS = ["photons.t", *(f"photons.sensor_pos_{axis}" for axis in "xyz")]

@dataclass
class PrometheusConfig:
    input_dir: str = "data/prometheus_photons"  # folder of photon files, *.parquet
    geometry: str = "data/kaggle/sensor_geometry.csv"  # or a .geo file, or GraphNeT's table
    out_dir: str = "data/prometheus_raw"  # folder to write
    events_per_batch: int = 10_000  # per file; their pulses are in memory
    merge_window: float = 3.3  # [ns] a 300 MHz sample, 0810.4930; 0 = none
    angles: Angles = "auto"  # which way they point in the files; auto: flight, if the light agrees
    seed: int = 0  # of the shift, 10,000 +- 300 ns

def open_photons(path):
    """Open a photon file and check that it is one."""
    file = open_parquet(path)
    names = file.schema_arrow.empty_table().flatten().column_names  # field t: photons.t
    missing = {*TRUTH.values(), *PHOTONS} - {*names}
    if missing:
        fail(f"{path}: no column {min(missing)}; is it a photon file of Prometheus?")
    return file

def flatten(column):
    """Return the items of a column of lists, and the row of each."""
    lists = column.chunk(0)
    row = np.repeat(np.arange(len(lists)), lists.value_lengths().fill_null(0))
    return lists.flatten().to_numpy(zero_copy_only=False), row

def classify(table):
    """Return event_class (n,): 1 with a muon, else 0 with a tau, else 2; 0 unknown."""
    event_class = np.zeros(len(table), np.uint8)
    if FINAL_STATES in table.column_names:
        kind, event = flatten(table[FINAL_STATES])
        event_class[event] = 2
        event_class[event[np.abs(kind) == 15]] = 0  # numbers of the Particle Data Group
        event_class[event[np.abs(kind) == 13]] = 1
    return event_class

def merge_photons(event, dom, time, window):
    """Merge photons of a DOM -> pulses: event, dom, time of the first, charge."""
    order = np.lexsort((time, dom, event))
    event, dom, time = event[order], dom[order], time[order]
    is_next = (np.diff(event, prepend=-1) != 0) | (np.diff(dom, prepend=-1) != 0)
    first, begin = [], 0
    for i, (is_new, t) in enumerate(zip(is_next.tolist(), time.tolist())):  # 10 M photons/s
        if is_new or window == 0 or not t - begin <= window:  # NaN too
            first.append(i)
            begin = t
    first = np.array(first, np.int64)
    charge = np.diff(first, append=len(time)).astype(np.float64)  # 1 p.e. per photon
    return event[first], dom[first], time[first], charge

def read_events(config, detector, files):
    """Yield META and PULSE records, some events at a time."""
    for number, path in enumerate(files, start=1):
        event_id = number * ROWS_PER_FILE
        columns = [*TRUTH.values(), FINAL_STATES, *PHOTONS]
        for batch in open_photons(path).iter_batches(EVENTS_AT_ONCE, columns=columns):
            table = pa.Table.from_batches([batch]).flatten()
            truth = {name: table[column].to_numpy() for name, column in TRUTH.items()}
            truth["event_id"] = event_id + np.arange(len(table))
            truth["event_class"] = classify(table)
            event_id += len(table)
            (time, event), (x, _), (y, _), (z, _) = (flatten(table[name]) for name in PHOTONS)
            if not len(time) == len(x) == len(y) == len(z):
                fail(f"{path}: t is longer or shorter than sensor_pos_x, _y or _z")
            dom = find_doms(detector, x, y, z)
            pulses = merge_photons(event, dom, time, config.merge_window)
            yield make_events(config, detector, path, truth, *pulses)

def main():
    config = load_config(PrometheusConfig, __doc__)
    if is_complete(config):
        return
    config.reading = "flight" if config.angles == "auto" else config.angles
    detector = read_doms(config.geometry)
    files = sorted(Path(config.input_dir).glob("*.parquet"))
    if not files:
        fail(f"{config.input_dir}: has no .parquet files, the photons")
    n_events = sum(open_photons(path).metadata.num_rows for path in files)
    convert(config, detector, {"pretrain": read_events(config, detector, files)}, n_events)

if __name__ == "__main__":
    run_main(main)
