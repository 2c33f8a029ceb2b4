"""KM3NeT's simulated muons (HDF5 of km3pipe) -> the Kaggle layout.

    pip install km3net-testdata h5py    # 650 events in ARCA, MIT licence
    python -m tools.km3net              # 10 s

A random half of the events is `val`; split_seed draws it.
Hits of a DOM within merge_window are one pulse; aux: none triggered KM3NeT.
"""
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

import numpy as np

from tools.kaggle_layout import NOWHERE, Angles, Detector, convert, is_complete, make_events
from tools.prometheus import ROWS_PER_FILE, merge_photons
from utils import fail, load_config, print0, run_main

PHOTOELECTRON = 26.4  # [ns] over threshold; the test data's hits peak at 26
HITS = [f"hits/{name}" for name in ("dom_id", "time", "tot", "triggered")]

@dataclass
class Km3netConfig:
    input_dir: str = ""  # folder; "" = the package km3net_testdata
    events: str = "hdf5/atmospheric_muons_sample.h5+hdf5/mupage_ARCA.h5"  # joined by +
    geometry: str = "detx/KM3NeT_-00000001_20171212.detx"  # version 2
    out_dir: str = "data/km3net_raw"  # folder to write
    events_per_batch: int = 10_000  # per file
    merge_window: float = 25.0  # [ns] one photoelectron; 0 = none
    angles: Angles = "flight"  # which way they point
    split_seed: int = 0  # which half is val
    seed: int = 0  # of the shift, 10,000 +- 300 ns

def read_detx(path):
    """Return the Detector. A DOM is at the mean of its PMTs."""
    rows = [line.split() for line in path.read_text().splitlines() if line.strip()]
    doms = [row for row in rows[4:] if len(row) == 4]
    pmts = [row for row in rows[4:] if len(row) == 8]
    if rows[0][-1] != "v2" or rows[3] != [str(len(doms))] or any(float(row[7]) for row in pmts):
        fail(f"{path}: damaged, not of version 2, or its t0 are not 0")
    (dom_id, string, _, n), pmts = np.array(doms, int).T, np.array(pmts, float)
    position = np.add.reduceat(pmts[:, 1:4], np.cumsum(n) - n) / n[:, None]
    middle = (position.max(0) + position.min(0)) / 2
    print0(f"{path}: positions are from {middle.round(2).tolist()} m")
    dom_at = dict(zip(dom_id.tolist(), range(len(n))))
    return Detector(np.round(position - middle, 4), string, None, None, dom_at, {})

def read_events(config, detector, events):
    """Yield META and PULSE records of one event at a time."""
    for number, path, file, tracks, group, begin, end in events:
        dom_id, time, tot, triggered = (file[name][begin:end] for name in HITS)
        dom = np.array([detector.dom_at.get(name, NOWHERE) for name in dom_id.tolist()])
        order = np.lexsort((time, dom))  # as merge_photons does
        event, dom, time, n = merge_photons(0 * dom, dom, time, config.merge_window)
        first = (np.cumsum(n) - n).astype(int)
        tot, triggered = np.add.reduceat([tot[order], triggered[order]], first, axis=1)
        muons = tracks[(tracks["group_id"] == group) & (np.abs(tracks["type"]) == 13)]
        x, y, z = (np.append(muons[f"dir_{axis}"], np.nan)[:1] for axis in "xyz")
        truth = {"event_id": np.array([number * ROWS_PER_FILE + group]),
                 "azimuth": np.arctan2(y, x), "zenith": np.arctan2(np.hypot(x, y), z),
                 "energy": muons["energy"].sum(keepdims=True), "event_class": np.ones(1)}
        yield make_events(config, detector, path, truth, event, dom, time,
                          tot / PHOTOELECTRON, triggered > 0)

def main():
    config = load_config(Km3netConfig, __doc__)
    config.reading = "flight" if config.angles == "auto" else config.angles
    if is_complete(config):
        return
    try:
        import h5py
        folder = config.input_dir or files("km3net_testdata") / "data"
    except ImportError as error:
        fail(f"{error}; pip install km3net-testdata h5py")
    detector, events = read_detx(Path(folder, config.geometry)), []
    for number, name in enumerate(config.events.split("+"), start=1):
        path = Path(folder, name)
        file = h5py.File(path) if h5py.is_hdf5(path) else {}
        if "mc_tracks" not in file or "hits/group_id" not in file:
            fail(f"{path}: is no HDF5 file of km3pipe with mc_tracks and hits/group_id")
        group, begin = np.unique(file["hits/group_id"], return_index=True)
        source = number, path, file, file["mc_tracks"][:]
        events += [(*source, *row) for row in zip(group, begin, [*begin[1:], None])]
    order = np.random.default_rng(config.split_seed).permutation(len(events))
    splits = {name: read_events(config, detector, [events[i] for i in part])
              for name, part in zip(("finetune", "val"), np.array_split(order, 2))}
    convert(config, detector, splits, len(events))

if __name__ == "__main__":
    run_main(main)
