"""Stage 0: a toy IceCube in Kaggle's layout, to run all without a download.

    python simulate.py   # 200,000 events, 40 s, 2 cores
    python simulate.py --n_events=2000 --out_dir=data/tiny_raw

Neutrinos, a few cosmic-ray muons, light late by scattering in layers of
ice, noise, local coincidence, a trigger: pulses look real, and carry
direction and energy. But no photon is tracked, and energies and classes
are mixed to look right: no physics result may rest on it.
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
from utils import (fail, load_config, lock_folder, tqdm,
                   run_in_workers, run_main, write_atomic, write_json)

# Sources: [D] the detector, arXiv:1612.05093; [DC] DeepCore, 1109.6096; [A] AMANDA's track
# reconstruction, astro-ph/0407044; [I] the ice, 1301.5361; [C] cascades, 1210.5140;
# [PMT] 1002.2442; [SPE] 2002.00997; [PDG] Review of Particle Physics; [K] read off the
# Kaggle files; [toy] chosen by us so that the pulses look right, their statistics like [K].

# detector [m]: a triangular grid whose first rows grow to the left; DeepCore in thirds of it
ROW_LENGTHS = 6, 7, 8, 9, 10, 10, 9, 8, 7, 4  # [D]
STRING_SPACING, DOM_SPACING = 125.0, 17.02  # [D]
GRID_ANGLE = np.pi / 20  # to x, off a figure [D]
TOP_Z = 500.0  # z = 0: 1948 m deep [D]
DEEPCORE = (11, 3), (11, 4), (14, 2), (13, 4), (11, 5), (10, 4), (11, 2), (13, 1)
DEEPCORE_STEPS = -188, *[10] * 9, 257, *[7] * 49  # down [DC]
DEEPCORE_EFFICIENCY = 1.35  # of others' [DC]
DOM_AREA = 1.2e-3  # [m^2] x efficiency, rough [PMT]
EFFICIENCY_SPREAD, DEAD_SHARE = 0.1, 0.02  # of DOMs [D]
UPWARD = 0.5  # tubes look down [toy]
# neutrinos [GeV, m]
ENERGY_MIN, ENERGY_MAX = 1e2, 5e6
SPECTRUM = 1 - 1.68  # E^-1.68, flatter than nature's [toy]
TRACK_SHARE, THROUGH_SHARE = 0.5, 0.5  # with a muon; of these from outside [toy]
VOLUME = 600.0, 600.0  # radius, half height [toy]
INELASTICITY = 1.5  # cascade: u^1.5 [toy]
IONISATION, RADIATION = 0.24, 3.3e-4  # per m [PDG]
COINCIDENT_SHARE = 0.04  # x TRACK_SHARE: second muons [toy]
# light [m, ns]: dirt is dust relative to the ice above the dust layer
C, INDEX = 0.299792458, 1.33  # of ice [A]
CONE = np.arccos(1 / INDEX)  # Cherenkov
PER_METRE, PER_GEV = 3e4, 1.4e5  # photons [PDG, C]
SCATTERING, ABSORPTION = 27.0, 110.0  # for dirt 1 [I]
DIFFUSION = SCATTERING / 3  # of a random walk
DECAY = np.sqrt(ABSORPTION * DIFFUSION)  # of it
DEEP_DIRT, DUST_DIRT = 0.55, 3.5  # below, in the layer [I]
DUST_Z, DUST_WIDTH = -102.0, 40.0  # [I]
LAYER, LAYER_SPREAD = 10.0, 0.25  # of log dirt [I]
PANDEL_LENGTH, PANDEL_TIME = 33.3, 557.0  # [A]
CASCADE_COSINE = 0.66  # mean [C, unchecked]
MIN_EXPECTED = 1e-2  # [p.e.] in the last DOM in reach
# electronics [ns, p.e.]: neighbours are two DOMs up and two down
SATURATION = 3000.0  # after K's largest [toy]
TIME_JITTER = 3.0  # of tube and clock [PMT]
MERGE_TIME = 70  # of photons in one pulse [toy]
CHARGE_WIDTH = 0.3  # of a Gauss around 1 [SPE]
LOW_SHARE, LOW_MEAN = 0.25, 0.3  # exponential [SPE]
CHARGE_MIN, CHARGE_STEP = 0.025, 0.05  # [K]
LATE_SHARE, LATE_TIME = 0.04, 60.0  # pulses [PMT]
AFTERPULSE_SHARE, AFTERPULSE_TIME = 0.06, 3000.0  # [PMT]
NOISE_RATE = 3.7e-7  # of a DOM [toy, 5e-7 in D]
COINCIDENCE_TIME = 1000  # [D]
TRIGGER_PULSES, TRIGGER_TIME = 6, 5000  # [toy, 8 in D], [D]
BEFORE, AFTER = 4000, 9500  # [D], [toy, 6000 in D]
TRIGGER_AT, TRIGGER_SHAKE = 10_000, 300  # +- [K]
ID_STEP = 16  # of event_id, on average [K]
CHUNK, BLOCK, MAX_PHOTONS = 128, 6, 300  # at once, for speed

# records in memory, columns of the files; Kaggle's have no energy and class
PULSE = [("sensor_id", "int16"), ("time", "int64"), ("charge", "float64"),
         ("auxiliary", "bool"), ("event_id", "int64")]
META = [("batch_id", "int64"), ("event_id", "int64"),
        ("first_pulse_index", "int64"), ("last_pulse_index", "int64"),
        ("azimuth", "float64"), ("zenith", "float64"),
        ("energy", "float64"), ("event_class", "uint8")]
PULSE_SCHEMA, META_SCHEMA = pa.schema(PULSE), pa.schema(META)

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
    """Return IceCube's DOMs (5160, 3) [m], 60 a string."""
    grid = [(row, i - min(row, 4))
            for row, n in enumerate(ROW_LENGTHS) for i in range(n)]
    row, column = np.append(grid, np.divide(DEEPCORE, 3), 0).T
    xy = column + row * np.exp(1j * np.pi / 3)  # x + iy
    xy = (xy - xy[:78].mean()) * np.exp(1j * GRID_ANGLE)
    xy = STRING_SPACING * xy.repeat(60)
    z = np.tile(TOP_Z - DOM_SPACING * np.arange(60), (86, 1))
    z[78:] = -np.cumsum(DEEPCORE_STEPS)
    return np.stack([xy.real, xy.imag, z.ravel()], 1).round(2)

def geometry_csv(path):
    """Return sensor_geometry.csv; without path IceCube's."""
    icecube = build_geometry(), np.arange(5160) // 60
    position, string = read_geometry_csv(path) if path else icecube
    size = np.abs(position).max(0)
    if size.max() < 10 or size[2] > 1500 or len(string) > 32_767:
        fail(f"{path}: needs m from the middle, at most 32,767 DOMs")
    rows = enumerate(zip(position.tolist(), string))
    lines = [f"{i},{x},{y},{z},{s}" for i, ((x, y, z), s) in rows]
    return "\n".join(["sensor_id,x,y,z,string", *lines, ""])

def number_along_strings(position, string):
    """Number DOMs by string and depth (V,), with gaps of 3."""
    return np.lexsort((-position[:, 2], string)).argsort() + 2 * string

def describe_detector(position, string):
    """Return doms (3, V), volume (2,), efficiency, rung (V,)."""
    sizes = [(np.hypot(x, y).max(), np.abs(z).max())
             for x, y, z in (position.T, build_geometry().T)]
    volume = VOLUME * np.divide(*sizes)
    n = len(string)
    rng = np.random.default_rng(n)
    efficiency = rng.normal(1, EFFICIENCY_SPREAD, n)
    efficiency[rng.random(n) < DEAD_SHARE] = 0
    efficiency[(n == 5160) & (string >= 78)] *= DEEPCORE_EFFICIENCY
    return position.T.copy(), volume, efficiency, number_along_strings(position, string)

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
    reach = np.log1p(muon * RADIATION / IONISATION) / RADIATION
    back = reach * rng.random(n) * (rng.random(n) < THROUGH_SHARE)
    return events, vertex - flight * back, flight, muon

def dirt_profile():
    """Return heights, dirt summed up to them (2, L)."""
    z = LAYER * np.arange(-500, 501)
    x = (z - DUST_Z) / DUST_WIDTH
    root = np.hypot(1, x)  # x / root: step, 1 / root^3: bell
    dirt = (1 + DEEP_DIRT + (1 - DEEP_DIRT) * x / root) / 2 + DUST_DIRT / root ** 3
    dirt *= np.random.default_rng(0).lognormal(0, LAYER_SPREAD, len(z))
    return np.stack([z, np.cumsum(LAYER * dirt)])

DIRT = dirt_profile()

def mean_dirt(a, b):
    """Return the mean dirt between depths; lengths go as 1 / dirt."""
    a = np.where(np.abs(b - a) < 0.1, b - 0.1, a)
    return (np.interp(b, *DIRT) - np.interp(a, *DIRT)) / (b - a)

def light(r, dirt, is_line):
    """Return photons/m^2 per photon of a point, photon/m of a line."""
    if is_line:
        length = (DIFFUSION / np.sin(CONE)) ** 2 * 2 / (np.pi * DECAY)
        x, area = np.sqrt(r * dirt / length), 2 * np.pi * np.sin(CONE) * r
    else:
        x, area = r * dirt / DIFFUSION, 4 * np.pi * r ** 2
    return np.exp(-r * dirt / DECAY) * x / np.tanh(x) / area

def pairs_in_reach(vertex, flight, is_line, strength, doms):
    """Find DOMs near points or lines -> event, dom, way^2, along."""
    grid = np.geomspace(1, 2000, 400)
    most = np.log(DOM_AREA * light(grid, DEEP_DIRT, is_line))
    reach = np.interp(np.log(strength / MIN_EXPECTED), -most, grid)
    # slow form: np.nonzero(distance of event to DOM < reach[:, None]); blocks add some pairs
    size = np.gcd(BLOCK, doms.shape[1])
    blocks = doms.reshape(3, -1, size)
    center = blocks.mean(2)
    radius = ((blocks - center[..., None]) ** 2).sum(0).max(1) ** 0.5
    way = center[:, None] - vertex[..., None]  # (3, n, n_blocks)
    along = np.einsum("ijk,ij->jk", way, flight) if is_line else 0
    r2 = np.einsum("ijk,ijk->jk", way, way) - along ** 2
    event, block = np.nonzero(r2 < (reach[:, None] + radius) ** 2)
    event = event.repeat(size)
    dom = (size * block[:, None] + np.arange(size)).ravel()
    way = doms.take(dom, 1) - vertex.take(event, 1)
    along = (way * flight.take(event, 1)).sum(0)
    return event, dom, (way ** 2).sum(0), along

def cascade_light(vertex, flight, energy, doms):
    """Return event, dom, photons, direct time, path, dirt of pairs."""
    n = PER_GEV * energy
    event, dom, r2, along = pairs_in_reach(vertex, flight, False, n, doms)
    r = np.sqrt(r2 + 1)  # never zero
    z, cosine = vertex[2][event], along / r
    dirt = mean_dirt(z, doms[2][dom])
    # Light goes a step forward before it walks at random. So DOMs ahead of the vertex see
    # more of it, and earlier. Photons tracked one by one agree (test at commit f527d2e).
    ahead = CASCADE_COSINE * SCATTERING / dirt
    slope = ahead * dirt / DECAY + ahead / (r + DIFFUSION / dirt)
    forward = slope / np.sinh(slope) * np.exp(slope * cosine)
    photons = n[event] * forward * light(r, dirt, False)
    photons *= DOM_AREA * (1 + UPWARD * (doms[2][dom] - z) / r)
    time, path = r * INDEX / C, r + ahead * (1 - cosine)
    return event, dom, photons, time, path, dirt

def track_light(vertex, flight, energy, doms):
    """Return the same for muons with smooth losses."""
    loss = PER_GEV * RADIATION
    n = np.where(energy > 0, PER_METRE + loss * energy, 1e-9)
    event, dom, r2, along = pairs_in_reach(vertex, flight, True, n, doms)
    r = np.sqrt(np.maximum(r2 - along ** 2, 0) + 1)
    emitted = along - r / np.tan(CONE)  # from the vertex
    turn = IONISATION / RADIATION  # [GeV] losses are equal
    left = (energy[event] + turn) * np.exp(-RADIATION * emitted) - turn
    lit = np.flatnonzero((emitted > 0) & (left > 0))
    event, dom, along, r, emitted, left = (
        x[lit] for x in (event, dom, along, r, emitted, left))
    path = r / np.sin(CONE)
    z = vertex[2][event] + emitted * flight[2][event]
    dirt = mean_dirt(z, doms[2][dom])
    photons = (PER_METRE + loss * left) * light(r, dirt, True)
    photons *= DOM_AREA * (1 + UPWARD * (doms[2][dom] - z) / path)
    time = (along + r * np.tan(CONE)) / C
    return event, dom, photons, time, path, dirt

def draw_photons(event, dom, mean, time, path, dirt, efficiency, rng):
    """Draw photons, noise -> event, dom, time, weight (how many)."""
    mean = mean * efficiency[dom]
    n = rng.poisson(mean / (1 + mean / SATURATION))
    pair = np.repeat(np.arange(len(n)), np.minimum(n, MAX_PHOTONS))
    # Pandel's law: shape ~ scatterings on the way, and long detours are absorbed
    dirt = dirt[pair]
    scale = 1 / (1 / PANDEL_TIME + C / INDEX * dirt / ABSORPTION)
    time = time[pair] + rng.gamma(path[pair] * dirt / PANDEL_LENGTH, scale)
    draw = rng.random(len(pair))
    time[draw > 1 - LATE_SHARE] += LATE_TIME
    again = np.flatnonzero(draw < AFTERPULSE_SHARE)
    after = time[again] + rng.gamma(2, AFTERPULSE_TIME, len(again))
    pair, time = np.append(pair, pair[again]), np.append(time, after)
    event = event[pair]
    weight = np.maximum(n[pair] / MAX_PHOTONS, 1)
    # noise around the photons of an event; fewer than TRIGGER_PULSES hardly trigger
    first = np.full(CHUNK, np.inf)
    last = -first
    np.minimum.at(first, event, time)
    np.maximum.at(last, event, time)
    is_bright = np.bincount(event, minlength=CHUNK) >= TRIGGER_PULSES
    span = np.where(is_bright, last - first + BEFORE + AFTER, 0)
    n = rng.poisson(NOISE_RATE * len(efficiency) * span)
    dark, n = np.repeat(np.arange(CHUNK), n), n.sum()
    event = np.append(event, dark)
    time = np.append(time, first[dark] - BEFORE + span[dark] * rng.random(n))
    dom = np.append(dom[pair], rng.integers(len(efficiency), size=n))
    weight = np.append(weight, np.ones(n))
    seen = is_bright[event] & (efficiency[dom] > 0)
    return [x[seen] for x in (event, dom, time, weight)]

def make_pulses(event, dom, time, weight, rung, rng):
    """Merge photons -> PULSE by event, DOM and time."""
    time = time + rng.normal(0, TIME_JITTER, len(time))
    time = np.floor(time).astype(int)
    # slow form, for each event, DOM and bin of MERGE_TIME: first time, sum of the charges
    key = (event * len(rung) + dom) * 2**32 + time + 2**31
    order = np.argsort(key, kind="stable")
    first = np.flatnonzero(np.diff(key[order] // MERGE_TIME, prepend=-1))
    charge = rng.normal(1, CHARGE_WIDTH, len(key))
    is_low = rng.random(len(key)) < LOW_SHARE
    charge[is_low] = rng.exponential(LOW_MEAN, is_low.sum())
    charge = np.abs(charge) * weight[order]
    charge = np.add.reduceat(charge, first) // CHARGE_STEP
    charge = np.round(CHARGE_MIN + CHARGE_STEP * charge, 3)
    event, dom, time = (x[order[first]] for x in (event, dom, time))
    aux = ~local_coincidence(event, rung[dom], time)
    return np.rec.fromarrays([dom, time, charge, aux, event], PULSE)

def local_coincidence(event, rung, time):
    """Return whether pulses have one in a neighbour within 1 us."""
    # Slow form, any over j: (event[i] == event[j]) & (abs(time[i] - time[j]) <= 1000)
    # & (1 <= abs(rung[i] - rung[j]) <= 2), rung: number_along_strings of its DOM.
    if len(time) == 0:
        return np.zeros(0, bool)
    window = 1000 * COINCIDENCE_TIME  # [ps], integers: exact
    time = np.rint(np.multiply(time, 1000.0)).astype(int)
    step = np.ptp(time) + window + 1  # to the next DOM
    event = np.asarray(event, int) - event.min()
    key = (event * (rung.max() + 3) + rung) * step + time
    ordered = np.append(np.sort(key), 2**63 - 1)
    found = False
    for offset in (-2, -1, 1, 2):
        early = key + offset * step - window
        following = ordered[np.searchsorted(ordered, early)]
        found |= following <= early + 2 * window
    return found

def trigger(pulses, rng):
    """Keep the readout of triggers -> PULSE by event and time."""
    key = pulses.event_id * 2**32 + pulses.time
    pulses = pulses.take(np.argsort(key, kind="stable"))
    event, time = pulses.event_id, pulses.time
    hlc = np.flatnonzero(~pulses.auxiliary)
    first, last = hlc[:1 - TRIGGER_PULSES], hlc[TRIGGER_PULSES - 1:]
    fired = event[first] == event[last]
    fired &= time[last] - time[first] <= TRIGGER_TIME
    first, last = first[fired], last[fired]
    start, end = np.full(CHUNK, 2**62), np.zeros(CHUNK, int)
    np.minimum.at(start, event[first], time[first])
    np.maximum.at(end, event[last], time[last])
    keep = (time >= start[event] - BEFORE) & (time <= end[event] + AFTER)
    shake = rng.integers(-TRIGGER_SHAKE, TRIGGER_SHAKE + 1, CHUNK)
    pulses.time += (TRIGGER_AT - start + shake)[event]
    return pulses.compress(keep)

def simulate_chunk(doms, volume, efficiency, rung, rng):
    """Simulate CHUNK neutrinos -> PULSE (event_id: row), META."""
    events, vertex, flight, muon = draw_neutrinos(CHUNK, volume, rng)
    cascades = cascade_light(vertex, flight, events["energy"] - muon, doms)
    tracks = track_light(vertex, flight, muon, doms)
    # now and then a muon of a cosmic ray, from above, in the same readout
    extra = np.flatnonzero(rng.random(CHUNK) < COINCIDENT_SHARE)
    _, vertex, flight, muon = draw_neutrinos(len(extra), volume, rng)
    down = -np.sign(flight[2])
    vertex[2], flight[2] = down * vertex[2], down * flight[2]
    row, dom, n, time, *rest = track_light(vertex, flight, muon, doms)
    time += rng.uniform(-BEFORE, AFTER, len(extra))[row]
    others = extra[row], dom, n, time, *rest
    pairs = map(np.concatenate, zip(cascades, tracks, others))
    photons = draw_photons(*pairs, efficiency, rng)
    pulses = trigger(make_pulses(*photons, rung, rng), rng)
    row, pulses.event_id = np.unique(pulses.event_id, return_inverse=True)
    return pulses, events[row]

# ---- files --------------------------------------------------------------------------------------

def write_parquet(path, rows, schema, **options):
    table = pa.table([rows[name] for name in schema.names], schema)
    write_atomic(path, lambda part: pq.write_table(
        table, part, write_page_checksum=True, **options))

def simulate_batch(path, seed, batch, first_event, n):
    """Write a batch file, last its rows of the meta table."""
    out_dir = path.parents[1]
    part = out_dir / ".parts" / path.name
    if part.exists():  # of a stopped run
        return n
    detector = describe_detector(*read_geometry_csv(out_dir / "sensor_geometry.csv"))
    np.empty(3_900_000)  # 31 MB freed: glibc then keeps memory, faster
    rng = np.random.default_rng([seed, batch])
    pulses, meta = [], []
    while (n_found := sum(map(len, meta))) < n:
        if len(meta) > 300 * (n_found + 1):
            fail(f"{n_found} of {len(meta) * CHUNK} neutrinos triggered; "
                 "give the geometry a column string")
        chunk, events = simulate_chunk(*detector, rng)
        chunk["event_id"] += n_found
        pulses.append(chunk)
        meta.append(events)
    pulses, meta = np.concatenate(pulses), np.concatenate(meta)[:n]
    end = np.searchsorted(pulses["event_id"], np.arange(1, n + 1))
    pulses = pulses[:end[-1]]
    meta["first_pulse_index"][1:] = end[:-1]
    meta["last_pulse_index"] = end - 1
    meta["batch_id"] = batch
    meta["event_id"] = ID_STEP * (first_event + np.arange(n)) + rng.integers(ID_STEP, size=n)
    pulses["event_id"] = meta["event_id"][pulses["event_id"]]
    few_values = ["sensor_id", "charge", "event_id"]
    write_parquet(path, pulses, PULSE_SCHEMA, use_dictionary=few_values)
    write_parquet(part, meta, META_SCHEMA)
    return n

def print_statistics(path):
    """Print numbers beside Kaggle's (notebooks on 1,000 events)."""
    _, time, charge, aux, event_id = map(np.asarray, pq.read_table(path).columns)
    begin = np.flatnonzero(np.diff(event_id, prepend=-1))
    unmasked = 0.75 ** np.add.reduceat(~aux, begin, dtype=int)
    toy = [f(x) for x in (charge, time) for f in (np.mean, np.median, np.std)]
    toy += len(time) / len(begin), 100 * unmasked.mean()
    print("""toy (Kaggle)      mean            median          std
charge [p.e.]  {:7.5g} (2.28)  {:7.5g} (1.02)  {:7.5g} (8.8)
time [ns]      {:7.5g} (12460) {:7.5g} (11904) {:7.5g} (3291)
pulses per event {:.5g} (139)
nothing masked at 25 % [%] {:.5g} (3.2)""".format(*toy))

def main():
    config = load_config(SimulateConfig, __doc__)
    out_dir = Path(config.out_dir)
    record, parts = out_dir / "simulate.json", out_dir / ".parts"
    geometry = geometry_csv(config.geometry)
    settings = {k: repr(v) for k, v in globals().items()
                if k.isupper() and type(v) in (int, float, tuple)}
    settings |= asdict(config) | {"out_dir": "", "workers": 0}
    settings["geometry"] = zlib.crc32(geometry.encode())
    if record.exists():
        for name, value in json.loads(record.read_text()).items():
            if value != settings.get(name):
                fail(f"{record}: {name} was {value}; choose another out_dir")
        if not parts.exists():
            print(f"{out_dir} is complete")
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
    with lock_folder(parts), tqdm(total=n_all, disable=None) as bar:
        write_json(record, settings)
        write_atomic(out_dir / "sensor_geometry.csv", lambda x: x.write_text(geometry))
        run_in_workers(simulate_batch, jobs, config.workers, bar.update)
    meta = pq.read_table([parts / job[0].name for job in jobs])
    write_parquet(out_dir / "train_meta.parquet", meta[:n_train],
                  META_SCHEMA, row_group_size=size)
    if n_all > n_train:  # without labels
        write_parquet(out_dir / "test_meta.parquet", meta[n_train:],
                      pa.schema(META[:4]), row_group_size=size)
    print(f"{out_dir}: {len(jobs)} files, {len(meta):,} events")
    print_statistics(jobs[0][0])
    shutil.rmtree(parts)  # last: complete

if __name__ == "__main__":
    run_main(main)
