"""Stage 0: a toy IceCube in Kaggle's layout, so that all runs without a download.

    python simulate.py   # 200,000 events into data/demo_raw, 40 s, 2 cores
    python simulate.py --n_events=2000 --out_dir=data/tiny_raw

What it is: a muon or a cascade at a random place, light that falls with distance
and is late by scattering, noise, local coincidence, a trigger. Pulses look real,
and carry direction and energy. What it is not: a simulation of IceCube. No photon
is tracked, the ice is one curve, energies and classes are mixed to look right,
cosmic-ray muons are missing. No physics result may rest on it.
"""
import json
import shutil
import zlib
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from data import read_geometry_csv
from utils import (fail, load_config, lock_folder, progress_bar,
                   run_in_workers, run_main, write_atomic, write_json)

# Sources: [D] the detector, arXiv:1612.05093; [DC] DeepCore, 1109.6096; [A] AMANDA's track
# reconstruction, astro-ph/0407044; [I] the ice, 1301.5361; [C] cascades, 1210.5140;
# [PMT] 1002.2442; [SPE] 2002.00997; [PDG] Review of Particle Physics; [K] read off the
# Kaggle files; [toy] chosen by us so that the pulses look right.

# detector: strings 1..78 are rows of a triangular grid, 79..86 are DeepCore
ROW_LENGTHS = 6, 7, 8, 9, 10, 10, 9, 8, 7, 4  # [D]
STRING_SPACING = 125.0  # [m] [D]
GRID_ANGLE = 9.0  # [degree] to x, off a figure [D]
TOP_Z, DOM_SPACING = 500.0, 17.02  # [m] 0: 1948 m deep [D]
CENTRAL, DEEPCORE_TOP_Z = 35, 188.0  # string 36, [m] [DC]
DEEPCORE_ROWS = -1, -1, 2, 1, -1, -2, -1, 1  # from it, / 3
DEEPCORE_COLUMNS = 0, 1, -1, 1, 2, 1, -1, -2
DEEPCORE_SPACINGS = *[10] * 9, 257, *[7] * 49  # [m] [DC]
DEEPCORE_EFFICIENCY = 1.35  # of others' [DC]
DOM_AREA = 1.2e-3  # [m^2] tube x efficiency, rough [PMT]
UPWARD = 0.5  # tubes look down: 1 + 0.5 cos [toy]
# neutrinos
ENERGY_MIN, ENERGY_MAX = 1e2, 5e6  # [GeV]
SPECTRUM = 1 - 1.9  # E^-1.9, flatter than nature's [toy]
TRACK_SHARE = 0.5  # of neutrinos with a muon [toy]
THROUGH_SHARE = 0.5  # of these: from outside [toy]
VOLUME = 600.0, 600.0  # [m] radius, half height in IceCube [toy]
INELASTICITY = 1.5  # cascade of a track: u^1.5 [toy]
IONISATION, RADIATION = 0.24, 3.3e-4  # [GeV/m], [1/m] [PDG]
# light: dirt is dust relative to the ice above the dust layer
C, INDEX = 0.299792458, 1.33  # [m/ns], of ice [A]
CONE = np.arccos(1 / INDEX)  # [rad] Cherenkov
PER_METRE, PER_GEV = 3e4, 1.4e5  # photons of muon, cascade [PDG, C]
SCATTERING, ABSORPTION = 27.0, 110.0  # [m] for dirt 1 [I]
DIFFUSION = SCATTERING / 3  # [m] of a random walk
DECAY = np.sqrt(ABSORPTION * DIFFUSION)  # [m] of it
DEEP_DIRT, DUST_DIRT = 0.55, 3.5  # below, in the layer [I]
DUST_Z, DUST_WIDTH = -102.0, 40.0  # [m] [I]
PANDEL_LENGTH, PANDEL_TIME = 33.3, 557.0  # [m], [ns] [A]
CASCADE_COSINE = 0.66  # mean of its photons [C, unchecked]
MIN_EXPECTED = 1e-2  # [p.e.] in the last DOM in reach
# electronics: a pulse's neighbours are two DOMs up and two down
SATURATION = 5000.0  # [p.e.] after K's largest [toy]
TIME_JITTER = 3.0  # [ns] of tube and clock [PMT]
MERGE_TIME = 8  # [ns] of photons in one pulse [toy]
CHARGE_MEAN, CHARGE_WIDTH = 1.0, 0.3  # [p.e.] Gauss [SPE]
LOW_SHARE, LOW_MEAN = 0.25, 0.3  # exponential instead [SPE]
CHARGE_MIN, CHARGE_STEP = 0.025, 0.05  # [p.e.] [K]
NOISE_RATE = 5e-7  # [1/ns] per DOM, about 500 Hz [D]
COINCIDENCE_TIME = 1000  # [ns] to a neighbour [D]
TRIGGER_PULSES, TRIGGER_TIME = 8, 5000  # [ns] [D]
BEFORE, AFTER = 4000, 6000  # [ns] read out around it [D]
TRIGGER_AT, TRIGGER_SHAKE = 10_000, 300  # [ns] +- [K]
MAX_PULSES = 100_000  # events with more are dropped [K]
MAX_PHOTONS = 300  # drawn per DOM and source
ID_STEP = 16  # of event_id, on average [K]
CHUNK, BLOCK = 128, 6  # neutrinos, DOMs at once, for speed

# records in memory, columns of the files; Kaggle's have no energy and class
PULSE = [("sensor_id", "int16"), ("time", "int64"), ("charge", "float64"),
         ("auxiliary", "bool"), ("event_id", "int64")]
META = [("batch_id", "int64"), ("event_id", "int64"),
        ("first_pulse_index", "int64"), ("last_pulse_index", "int64"),
        ("azimuth", "float64"), ("zenith", "float64"),
        ("energy", "float64"), ("event_class", "uint8")]
PANDAS = {"index_columns": ["event_id"], "column_indexes": [],
          "pandas_version": "2.0.0", "columns": [
              dict(name=x, field_name=x, pandas_type=kind, numpy_type=kind,
                   metadata=None) for x, kind in PULSE]}
PULSE_SCHEMA = pa.schema(PULSE, {"pandas": json.dumps(PANDAS)})
META_SCHEMA, TEST_META_SCHEMA = pa.schema(META), pa.schema(META[:4])

@dataclass
class SimulateConfig:
    out_dir: str = "data/demo_raw"  # folder to write
    n_events: int = 200_000  # in train/, with labels
    events_per_batch: int = 10_000  # per file, 250 MB of memory
    n_test_events: int = 1000  # in test/, 0 for none
    seed: int = 1  # batch b depends on seed and b
    geometry: str = ""  # csv with sensor_id,x,y,z; "" = IceCube
    workers: int = 0  # processes; 0 = one per core

# ---- detector -----------------------------------------------------------------------------------

def build_geometry():
    """Return IceCube's DOMs by design (5160, 3) [m], 60 a string."""
    row = np.repeat(np.arange(10), ROW_LENGTHS)
    column = np.concatenate([np.arange(n) for n in ROW_LENGTHS])
    column -= np.minimum(row, 4)  # the first rows grow to the left
    # DeepCore: two strings near the central one, six in the triangles around it
    row = np.append(row, row[CENTRAL] + np.divide(DEEPCORE_ROWS, 3))
    column = np.append(column, column[CENTRAL] + np.divide(DEEPCORE_COLUMNS, 3))
    along = np.exp(1j * np.deg2rad(GRID_ANGLE))  # x + iy
    xy = along * (column + row * np.exp(1j * np.pi / 3))
    xy = STRING_SPACING * (xy - xy[:78].mean()).repeat(60)
    z = np.tile(TOP_Z - DOM_SPACING * np.arange(60), (86, 1))
    z[78:] = DEEPCORE_TOP_Z - np.cumsum([0, *DEEPCORE_SPACINGS])
    return np.stack([xy.real, xy.imag, z.ravel()], 1).round(2)

def geometry_csv(path) -> str:
    """Return the text of sensor_geometry.csv; without path IceCube's."""
    icecube = build_geometry(), np.arange(5160) // 60
    position, string = read_geometry_csv(path) if path else icecube
    size = np.abs(position).max(0)
    if size.max() < 10 or size[2] > 1500 or len(string) > 32_767:
        fail(f"{path}: needs m from the middle, at most 32,767 DOMs")
    rows = zip(position.tolist(), string.tolist())
    lines = [f"{i},{x},{y},{z},{s}" for i, ((x, y, z), s) in enumerate(rows)]
    return "\n".join(["sensor_id,x,y,z,string", *lines, ""])

def number_along_strings(position, string):
    """Number DOMs by string and depth (V,), with gaps of 3."""
    order = np.lexsort((-position[:, 2], string))
    return np.argsort(order) + 2 * string

def describe_detector(position, string):
    """Return doms (3, V), volume (2,) [m], efficiency (V,), rung (V,)."""
    sizes = [(np.hypot(x, y).max(), np.abs(z).max())
             for x, y, z in (position.T, build_geometry().T)]
    volume = VOLUME * np.divide(*sizes)
    is_deepcore = (len(string) == 5160) & (string >= 78)
    efficiency = np.where(is_deepcore, DEEPCORE_EFFICIENCY, 1.0)
    rung = number_along_strings(position, string)
    return position.T.copy("C"), volume, efficiency, rung

def dot(a, b):  # not BLAS, whose sums depend on the machine
    return a[0] * b[0] + a[1] * b[1] + a[2] * b[2]

# ---- events: vectors are (3, n), for speed ------------------------------------------------------

def draw_neutrinos(n, volume, rng):
    """Draw neutrinos -> META, vertex, flight, muon's energy or 0."""
    events = np.zeros(n, META)
    events["azimuth"] = azimuth = 2 * np.pi * rng.random(n)
    events["zenith"] = zenith = np.arccos(1 - 2 * rng.random(n))
    r, z = np.sin(zenith), np.cos(zenith)
    flight = -np.stack([np.cos(azimuth) * r, np.sin(azimuth) * r, z])
    width = (ENERGY_MAX / ENERGY_MIN) ** SPECTRUM - 1
    energy = ENERGY_MIN * (1 + rng.random(n) * width) ** (1 / SPECTRUM)
    is_track = rng.random(n) < TRACK_SHARE
    events["energy"], events["event_class"] = energy, 2 - is_track
    muon = is_track * energy * (1 - rng.random(n) ** INELASTICITY)
    r = volume[0] * np.sqrt(rng.random(n))
    angle = 2 * np.pi * rng.random(n)
    z = volume[1] * (2 * rng.random(n) - 1)
    vertex = np.stack([r * np.cos(angle), r * np.sin(angle), z])
    reach = np.log1p(muon * RADIATION / IONISATION) / RADIATION  # [m]
    back = flight * reach * rng.random(n)
    vertex -= back * (rng.random(n) < THROUGH_SHARE)
    return events, vertex, flight, muon

def mean_dirt(a, b):
    """Return the mean dirt between depths; lengths go as 1 / dirt."""
    def integral(z):
        x = (z - DUST_Z) / DUST_WIDTH
        root = np.sqrt(1 + x * x)  # x / root: step, 1 / root^3: bell
        layer = (1 - DEEP_DIRT) / 2 * root + DUST_DIRT * x / root
        return (1 + DEEP_DIRT) / 2 * z + DUST_WIDTH * layer
    a = np.where(np.abs(b - a) < 0.1, b - 0.1, a)
    return (integral(b) - integral(a)) / (b - a)

def light(r, dirt, is_line):
    """Return photons/m^2 per photon of a point, or photon/m of a line."""
    if is_line:
        length = (DIFFUSION / np.sin(CONE)) ** 2 * 2 / (np.pi * DECAY)
        x, area = np.sqrt(r * dirt / length), 2 * np.pi * np.sin(CONE) * r
    else:
        x, area = r * dirt / DIFFUSION, 4 * np.pi * r ** 2
    return np.exp(-r * dirt / DECAY) * x / np.tanh(x) / area

def pairs_in_reach(vertex, flight, is_line, strength, doms):
    """Find DOMs near points or lines -> event, dom, way^2, along."""
    grid = np.geomspace(1, 2000, 400)  # [m]
    most = np.log(DOM_AREA * light(grid, DEEP_DIRT, is_line))
    reach = np.interp(np.log(strength / MIN_EXPECTED), -most, grid)
    # Slow form: np.nonzero(distance of each event to each DOM < reach[:, None]). Here whole
    # blocks of DOMs are tested, so some pairs are too far apart.
    size = np.gcd(BLOCK, doms.shape[1])
    blocks = doms.reshape(3, -1, size)
    center = blocks.mean(2)
    radius = ((blocks - center[:, :, None]) ** 2).sum(0).max(1) ** 0.5
    way = center[:, None] - vertex[:, :, None]  # (3, n, n_blocks)
    along = dot(way, flight[:, :, None]) if is_line else 0
    near = dot(way, way) - along ** 2 < (reach[:, None] + radius) ** 2
    event, block = np.nonzero(near)
    event = np.repeat(event, size)
    dom = (block[:, None] * size + np.arange(size)).ravel()
    # slow form: doms[:, dom] - vertex[:, event]
    way = [x[dom] - x0[event] for x, x0 in zip(doms, vertex)]
    along = dot(way, [x[event] for x in flight])
    return event, dom, dot(way, way), along

def cascade_light(vertex, flight, energy, doms):
    """Return event, dom, photons, time if direct, path, dirt of pairs."""
    n = PER_GEV * energy
    event, dom, r2, along = pairs_in_reach(vertex, flight, False, n, doms)
    r = np.sqrt(r2 + 1)  # never zero
    z, cosine = vertex[2][event], along / r
    dirt = mean_dirt(z, doms[2][dom])
    # Light goes a step forward before it walks at random. So DOMs ahead of the vertex see
    # more of it, and earlier. Photons tracked one by one agree (test at commit f527d2e).
    ahead = CASCADE_COSINE * SCATTERING / dirt  # [m]
    slope = ahead * dirt / DECAY + ahead / (r + DIFFUSION / dirt)
    forward = slope / np.sinh(slope) * np.exp(slope * cosine)
    photons = n[event] * forward * light(r, dirt, False)
    photons *= DOM_AREA * (1 + UPWARD * ((doms[2][dom] - z) / r))
    time, path = r * INDEX / C, r + ahead * (1 - cosine)
    return event, dom, photons, time, path, dirt

def track_light(vertex, flight, energy, doms):
    """Return the same for muons with smooth losses."""
    loss = PER_GEV * RADIATION
    n = np.where(energy > 0, PER_METRE + loss * energy, 1e-9)
    event, dom, r2, along = pairs_in_reach(vertex, flight, True, n, doms)
    r = np.sqrt(np.maximum(r2 - along ** 2, 0) + 1)
    emitted = along - r / np.tan(CONE)  # [m] from the vertex
    turn = IONISATION / RADIATION  # [GeV] losses are equal
    left = (energy[event] + turn) * np.exp(-RADIATION * emitted) - turn
    # from the vertex to where the muon stops
    lit = np.flatnonzero((emitted > 0) & (left > 0))
    event, dom, along, r, emitted, left = (
        x[lit] for x in (event, dom, along, r, emitted, left))
    path = r / np.sin(CONE)
    z = vertex[2][event] + emitted * flight[2][event]
    dirt = mean_dirt(z, doms[2][dom])
    photons = (PER_METRE + loss * left) * light(r, dirt, True)
    photons *= DOM_AREA * (1 + UPWARD * ((doms[2][dom] - z) / path))
    time = (along + r * np.tan(CONE)) / C
    return event, dom, photons, time, path, dirt

def draw_photons(event, dom, mean, time, path, dirt, rng):
    """Draw photons -> event, dom, time [ns], weight (how many)."""
    n = rng.poisson(mean / (1 + mean / SATURATION))
    hit = np.flatnonzero(n)
    drawn = np.minimum(n[hit], MAX_PHOTONS)
    pair = np.repeat(hit, drawn)
    # Pandel's law: shape ~ scatterings on the way, and long detours are absorbed
    dirt = dirt[pair]
    scale = 1 / (1 / PANDEL_TIME + C / INDEX * dirt / ABSORPTION)
    delay = scale * rng.standard_gamma(path[pair] * dirt / PANDEL_LENGTH)
    weight = (n[hit] / drawn).repeat(drawn)
    return event[pair], dom[pair], time[pair] + delay, weight

def draw_noise(event, time, n_doms, rng):
    """Draw dark pulses around the photons -> as draw_photons."""
    first, last = np.full(CHUNK, np.inf), np.full(CHUNK, -np.inf)
    np.minimum.at(first, event, time)
    np.maximum.at(last, event, time)
    span = np.maximum(last - first + BEFORE + AFTER, 0)  # 0: no photons
    n = rng.poisson(NOISE_RATE * n_doms * span)
    event, n = np.repeat(np.arange(CHUNK), n), n.sum()
    time = first[event] - BEFORE + span[event] * rng.random(n)
    return event, rng.integers(n_doms, size=n), time, np.ones(n)

def make_pulses(event, dom, time, weight, rung, rng):
    """Merge photons -> PULSE by event, DOM and time."""
    time = time + TIME_JITTER * rng.standard_normal(len(time))
    # Slow form: for each event, DOM and bin of MERGE_TIME the first time and the sum
    # of the charges. Here at once: key // MERGE_TIME numbers the bins of all DOMs.
    time = np.floor(time).astype(int) + 2**31
    key = (event * len(rung) + dom) * 2**32 + time
    order = np.argsort(key, kind="stable")
    key = key[order]
    first = np.flatnonzero(np.diff(key // MERGE_TIME, prepend=-1))
    charge = rng.normal(CHARGE_MEAN, CHARGE_WIDTH, len(key))
    is_low = rng.random(len(key)) < LOW_SHARE
    charge[is_low] = rng.exponential(LOW_MEAN, is_low.sum())
    charge = np.abs(charge) * weight[order]
    charge = np.add.reduceat(charge, first) // CHARGE_STEP
    charge = np.round(CHARGE_MIN + CHARGE_STEP * charge, 3)
    channel, time = np.divmod(key[first], 2**32)
    event, dom = np.divmod(channel, len(rung))
    aux = ~local_coincidence(event, rung[dom], time)
    columns = dom, time - 2**31, charge, aux, event
    return np.rec.fromarrays(columns, np.dtype(PULSE, align=True))

def local_coincidence(event, rung, time):
    """Return for each pulse whether a neighbour, one or two DOMs up or down, has
    one of the event within 1 us. rung: number_along_strings of its DOM.
    """
    # Slow form, any over j: (event[i] == event[j]) & (abs(time[i] - time[j]) <= 1000)
    # & (1 <= abs(rung[i] - rung[j]) <= 2).
    if len(time) == 0:
        return np.zeros(0, bool)
    window = 1000 * COINCIDENCE_TIME  # [ps], integers: exact
    time = np.rint(np.multiply(time, 1000.0)).astype(int)
    time -= time.min()
    step = time.max() + window + 1  # to the next DOM
    event = np.asarray(event, int) - event.min()
    key = (event * (rung.max() + 3) + rung) * step + time
    ordered = np.append(np.sort(key), 2**63 - 1)
    found = np.zeros(len(key), bool)
    for offset in (-2, -1, 1, 2):
        early = key + offset * step - window
        following = ordered[np.searchsorted(ordered, early)]
        found |= following <= early + 2 * window
    return found

def trigger(pulses, rng):
    """Keep the readout of triggers -> PULSE by event and time."""
    key = pulses["event_id"] * 2**32 + pulses["time"]
    pulses = pulses[np.argsort(key, kind="stable")]
    event, time = pulses["event_id"], pulses["time"]
    hlc = np.flatnonzero(~pulses["auxiliary"])
    first, last = hlc[:1 - TRIGGER_PULSES], hlc[TRIGGER_PULSES - 1:]
    fired = event[first] == event[last]
    fired &= time[last] - time[first] <= TRIGGER_TIME
    first, last = first[fired], last[fired]
    start, end = np.full(CHUNK, 2**62), np.zeros(CHUNK, int)
    np.minimum.at(start, event[first], time[first])
    np.maximum.at(end, event[last], time[last])
    keep = (time >= start[event] - BEFORE) & (time <= end[event] + AFTER)
    keep &= (np.bincount(event[keep], minlength=CHUNK) <= MAX_PULSES)[event]
    shake = rng.integers(-TRIGGER_SHAKE, TRIGGER_SHAKE + 1, CHUNK)
    pulses["time"] += (TRIGGER_AT - start + shake)[event]
    return pulses[keep]

def simulate_chunk(detector, rng):
    """Simulate CHUNK neutrinos -> PULSE (event_id: row of META), META."""
    doms, volume, efficiency, rung = detector
    events, vertex, flight, muon = draw_neutrinos(CHUNK, volume, rng)
    cascades = cascade_light(vertex, flight, events["energy"] - muon, doms)
    tracks = track_light(vertex, flight, muon, doms)
    event, dom, n, *rest = map(np.concatenate, zip(cascades, tracks))
    photons = draw_photons(event, dom, n * efficiency[dom], *rest, rng)
    n_photons = np.bincount(photons[0])[photons[0]]
    bright = n_photons >= TRIGGER_PULSES  # fewer hardly trigger
    photons = [x[bright] for x in photons]
    noise = draw_noise(photons[0], photons[2], len(rung), rng)
    photons = map(np.concatenate, zip(photons, noise))
    pulses = trigger(make_pulses(*photons, rung, rng), rng)
    row, event = np.unique(pulses["event_id"], return_inverse=True)
    pulses["event_id"] = event
    return pulses, events[row]

# ---- files --------------------------------------------------------------------------------------

def write_parquet(path, rows, schema, **options):
    table = pa.table([rows[name] for name in schema.names], schema)
    write_atomic(path, lambda part: pq.write_table(table, part, **options))

def simulate_batch(path, seed, batch, first_event, n):
    """Write a batch file, and last its rows of the meta table."""
    out_dir = path.parents[1]
    part = out_dir / ".parts" / path.name
    if part.exists():  # from a run that was stopped
        return n
    geometry = read_geometry_csv(out_dir / "sensor_geometry.csv")
    detector = describe_detector(*geometry)
    rng = np.random.default_rng([seed, batch])
    # 31 MB allocated and freed once: then glibc keeps what is freed, 8 % faster
    np.empty(3_900_000)
    pulses, meta = [], []
    while (n_found := sum(map(len, meta))) < n:
        if len(meta) > 300 * (n_found + 1):
            fail(f"{n_found} of {len(meta) * CHUNK} neutrinos triggered; "
                 "give the geometry a column string")
        chunk, events = simulate_chunk(detector, rng)
        chunk["event_id"] += n_found
        pulses.append(chunk)
        meta.append(events)
    pulses, meta = np.concatenate(pulses), np.concatenate(meta)[:n]
    end = np.searchsorted(pulses["event_id"], np.arange(1, n + 1))
    pulses = pulses[:end[-1]]
    meta["first_pulse_index"][1:] = end[:-1]
    meta["last_pulse_index"] = end - 1
    meta["batch_id"] = batch
    meta["event_id"] = ID_STEP * (first_event + np.arange(n))
    meta["event_id"] += rng.integers(ID_STEP, size=n)
    pulses["event_id"] = meta["event_id"][pulses["event_id"]]
    few_values = ["sensor_id", "charge", "event_id"]
    write_parquet(path, pulses, PULSE_SCHEMA, use_dictionary=few_values)
    write_parquet(part, meta, META_SCHEMA)
    return n

def main():
    config = load_config(SimulateConfig, __doc__)
    out_dir = Path(config.out_dir)
    record, parts = out_dir / "simulate.json", out_dir / ".parts"
    geometry = geometry_csv(config.geometry)
    settings = {name: repr(value) for name, value in globals().items()
                if name.isupper() and type(value) in (int, float, tuple)}
    settings |= asdict(config) | {"out_dir": "", "workers": 0}
    settings["geometry"] = zlib.crc32(geometry.encode())
    if record.exists():
        for name, value in json.loads(record.read_text()).items():
            if value != settings.get(name):
                fail(f"{record}: {name} was {value}; choose another out_dir")
        if not parts.exists():
            print(f"{out_dir} is complete, nothing to do")
            return
    elif (out_dir / "train").exists():
        fail(f"{out_dir}: simulate.py did not write it; choose another")
    size, n_train = config.events_per_batch, config.n_events
    jobs, n_all = [], n_train + config.n_test_events
    for split, first, end in ("train", 0, n_train), ("test", n_train, n_all):
        for start in range(first, end, size):
            batch, n = len(jobs) + 1, min(size, end - start)
            path = out_dir / split / f"batch_{batch}.parquet"
            jobs.append((path, config.seed, batch, start, n))
    with lock_folder(parts), progress_bar(n_all, "event") as bar:
        write_json(record, settings)
        write_atomic(out_dir / "sensor_geometry.csv", lambda x: x.write_text(geometry))
        run_in_workers(simulate_batch, jobs, config.workers, bar.update)
    meta = pq.read_table([parts / job[0].name for job in jobs])
    write_parquet(out_dir / "train_meta.parquet", meta[:n_train],
                  META_SCHEMA, row_group_size=size)
    if n_all > n_train:  # without labels
        write_parquet(out_dir / "test_meta.parquet", meta[n_train:],
                      TEST_META_SCHEMA, row_group_size=size)
    print(f"{out_dir}: {len(jobs)} files, {len(meta):,} events")
    shutil.rmtree(parts)  # last: complete

if __name__ == "__main__":
    run_main(main)
