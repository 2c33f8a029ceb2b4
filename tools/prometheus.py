"""Photon files of Prometheus (parquet) -> the Kaggle layout.

    python -m tools.prometheus sample_config/prometheus.py --input_dir=photons

Prints the next command. Photons of a DOM within merge_window are one pulse;
aux is by local coincidence. See docs/own_data.md.
"""
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from tools.kaggle_layout import (Angles, convert, find_doms, is_complete,
                                 make_events, open_parquet, read_doms)
from utils import fail, load_config, run_main

ROWS_PER_FILE = 10_000_000  # event_id = this * number of the file + row
EVENTS_AT_ONCE = 32  # of up to 150,000 photons
TRUTH = {x: f"mc_truth.initial_state_{x}" for x in ("energy", "azimuth", "zenith")}
FINAL_STATES = "mc_truth.final_state_type"  # optional
PHOTONS = ["photons.t", *(f"photons.sensor_pos_{axis}" for axis in "xyz")]

@dataclass
class PrometheusConfig:
    input_dir: str = "data/prometheus_photons"  # folder of photon files, *.parquet
    geometry: str = "data/kaggle/sensor_geometry.csv"  # or .geo, or GraphNeT's
    out_dir: str = "data/prometheus_raw"  # folder to write
    events_per_batch: int = 10_000  # per file; their pulses are in memory
    merge_window: float = 3.3  # [ns] a 300 MHz sample, 0810.4930; 0 = none
    angles: Angles = "auto"  # which way they point; auto: flight, if confirmed
    seed: int = 0  # of the shift, 10,000 +- 300 ns

def open_photons(path):
    file = open_parquet(path)
    names = file.schema_arrow.empty_table().flatten().column_names  # field t: photons.t
    missing = {*TRUTH.values(), *PHOTONS} - {*names}
    if missing:
        fail(f"{path}: no column {min(missing)}; is it of Prometheus?")
    return file

def flatten(column):
    """Return the items of a column of lists, and the row of each."""
    lists = column.chunk(0)
    row = np.repeat(np.arange(len(lists)), lists.value_lengths().fill_null(0))
    return lists.flatten().to_numpy(zero_copy_only=False), row

def classify(table):
    """Return event_class (n,): 1 with a muon, 0 with a tau or unknown, else 2."""
    event_class = np.zeros(len(table), np.uint8)
    if FINAL_STATES in table.column_names:
        kind, event = flatten(table[FINAL_STATES])
        event_class[event] = 2
        event_class[event[np.abs(kind) == 15]] = 0  # Particle Data Group
        event_class[event[np.abs(kind) == 13]] = 1
    return event_class

def merge_photons(event, dom, time, window):
    """Merge photons of a DOM -> pulses: event, dom, time of the first, charge."""
    order = np.lexsort((time, dom, event))
    event, dom, time = event[order], dom[order], time[order]
    is_new = (np.diff(event, prepend=-1) != 0) | (np.diff(dom, prepend=-1) != 0)
    first, begin = [], 0
    for i, (new, t) in enumerate(zip(is_new.tolist(), time.tolist())):  # 10 M photons/s
        if new or window == 0 or not t - begin <= window:  # NaN too
            first.append(i)
            begin = t
    first = np.array(first, int)
    charge = np.diff(first, append=len(time)).astype(float)  # 1 p.e. per photon
    return event[first], dom[first], time[first], charge

def read_events(config, detector, files):
    """Yield results of make_events, some events at a time."""
    columns = [*TRUTH.values(), FINAL_STATES, *PHOTONS]
    for number, path in enumerate(files, start=1):
        event_id = number * ROWS_PER_FILE
        for batch in open_photons(path).iter_batches(EVENTS_AT_ONCE, columns=columns):
            table = pa.Table.from_batches([batch]).flatten()
            truth = {name: table[column].to_numpy() for name, column in TRUTH.items()}
            truth["event_id"] = event_id + np.arange(len(table))
            truth["event_class"] = classify(table)
            event_id += len(table)
            (time, event), (x, _), (y, _), (z, _) = (flatten(table[name]) for name in PHOTONS)
            if not len(time) == len(x) == len(y) == len(z):
                fail(f"{path}: t is longer or shorter than sensor_pos_x, _y or _z")
            dom = find_doms(detector, path, x, y, z)
            pulses = merge_photons(event, dom, time, config.merge_window)
            yield make_events(config, detector, path, truth, *pulses)

def main():
    config = load_config(PrometheusConfig, __doc__)
    config.reading = "flight" if config.angles == "auto" else config.angles
    if is_complete(config):
        return
    detector = read_doms(config.geometry)
    files = sorted(Path(config.input_dir).glob("*.parquet"))
    n_events = sum(open_photons(path).metadata.num_rows for path in files)
    if not files:
        fail(f"{config.input_dir}: has no photon files, .parquet")
    convert(config, detector, {"pretrain": read_events(config, detector, files)}, n_events)

if __name__ == "__main__":
    run_main(main)
