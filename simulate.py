"""Stage 0: a toy IceCube that writes event files in the Kaggle layout, so that everything runs without a download.

    python simulate.py                                        # 200,000 events into data/demo_raw
    python simulate.py --n_events=2000 --events_per_batch=500 --out_dir=data/tiny_raw    # seconds
    python simulate.py --geometry=sensor_geometry.csv         # with the DOM positions of a file

Prints a bar, then what was written. About 2,000 events a second and core; the same bytes for any number of workers. A
run that was stopped goes on where it was; a folder that is complete is left as it is.

What it is: a muon or a cascade at a random place, light that falls with distance and arrives late by scattering, noise,
local coincidence, a trigger. Enough that pulses look like the real ones and carry direction and energy.
What it is not: a simulation of IceCube. Light is not tracked, the ice is one curve, energies and event classes are mixed
so that the events look right, there is no cosmic-ray muon, no broken DOM, no afterpulse. No physics result may rest on it.

The order below is the order in which things happen: geometry, events, light, pulses, trigger, files.
"""
import json
import multiprocessing
import os
import shutil
import signal
import threading
import zlib
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

from common import (check_not_negative, check_positive, fail, load_config, progress_bar, read_json, write_atomic,
                    write_json)

# Sources: [D] detector, arXiv:1612.05093; [DC] DeepCore, arXiv:1109.6096; [A] AMANDA reconstruction, astro-ph/0407044;
# [I] South Pole ice, arXiv:1301.5361; [PDG] Particle Data Group; [PMT] arXiv:1002.2442; [SPE] arXiv:2002.00997;
# [K] read off the Kaggle files; [toy] chosen by us so that the pulses look right.

# detector
N_DOMS = 5160  # 86 strings of 60 DOMs [D]
DOMS_PER_STRING = 60  # [D]
ROW_LENGTHS = (6, 7, 8, 9, 10, 10, 9, 8, 7, 4)  # strings 1..78 row by row, seen from above [D]
STRING_SPACING = 125.0  # [m] between neighbours of the triangular grid [D]
GRID_ANGLE = 9.0  # [degree] by which the rows are turned against the x axis, read off the top view in [D]
DOM_SPACING = 17.02  # [m] along strings 1..78 [D]
TOP_DOM_Z = 500.0  # [m] above the centre, which lies 1948 m deep; the first DOM is 1450 m deep [D]
CENTRAL_STRING = 36  # DeepCore stands around it [DC]
DEEPCORE_TOP_Z = 188.0  # [m] first DeepCore DOM, 1760 m deep [DC]
DEEPCORE_CAP_DOMS, DEEPCORE_CAP_SPACING = 10, 10.0  # [m] the cap above the dust layer [DC]
DEEPCORE_GAP = 257.0  # [m] from the cap's last DOM to the first of the 50 below [DC]
DEEPCORE_SPACING = 7.0  # [m] of those 50 [DC]
DEEPCORE_EFFICIENCY = 1.35  # photon efficiency of DeepCore's tubes against the others [DC]
DOM_AREA = 1.2e-3  # [m^2] effective area for one photon of 300-600 nm, mean over directions; from tube size and quantum
#                    efficiency in [D], rounded
UPWARD_RESPONSE = 0.5  # response 1 + 0.5 cos: tubes look down and see light that moves up best [toy]

# neutrinos
ENERGY_MIN, ENERGY_MAX = 1e2, 5e6  # [GeV] of the neutrino
SPECTRAL_INDEX = 1.9  # dN/dE ~ E^-1.9 of the interactions drawn, flatter than nature's, to fill the bright tail [toy]
TRACK_SHARE = 0.5  # of the interactions drawn; after the trigger somewhat more are tracks [toy]
THROUGH_SHARE = 0.5  # of the tracks come from outside the volume below, the others start in it [toy]
VOLUME_RADIUS, VOLUME_HALF_HEIGHT = 600.0, 600.0  # [m] cylinder of vertices (or a point of the track): detector + 100 m
INELASTICITY_POWER = 1.5  # share of a track's energy that its vertex cascade takes: u^1.5, mean 0.4 [toy]
IONISATION = 0.24  # [GeV/m] energy loss of a muon in ice that does not grow with energy [PDG]
RADIATION = 3.3e-4  # [1/m] energy loss that does, per energy [PDG]
LUMP_LENGTH = 25.0  # [m] pieces of track with one radiative loss each ...
LUMP_SPREAD = 1.0  # ... drawn around the mean, log-normal with this width [toy]

# light
LIGHT_SPEED = 0.299792458  # [m/ns] in vacuum [PDG]
REFRACTIVE_INDEX = 1.33  # of ice; phase and group velocity taken as the same [A]
PHOTONS_PER_METRE = 3e4  # [1/m] Cherenkov photons of a bare muon, 300-600 nm [PDG]
PHOTONS_PER_GEV = 1.4e5  # [1/GeV] of a cascade: 5 m of charged tracks per GeV, arXiv:1210.5140
SCATTERING_LENGTH = 27.0  # [m] effective, upper ice [I]
ABSORPTION_LENGTH = 110.0  # [m] upper ice [I]
DEEP_DIRT = 0.55  # dust below the layer relative to the upper ice: the clearest ice is deep [I]
DUST_LAYER_Z, DUST_LAYER_WIDTH = -102.0, 40.0  # [m] the layer 2000-2100 m deep [I]
DUST_LAYER_DIRT = 3.5  # what it has more than the upper ice at its densest [I]
PANDEL_LENGTH, PANDEL_TIME = 33.3, 557.0  # [m, ns] delay by scattering: gamma law of shape distance / length [A]
CASCADE_FORWARD = 0.8  # a cascade shines 1 + 0.8 cos(angle to its axis), washed out by scattering [toy]
CASCADE_TURN = 0.2  # extra path per distance of light that had to turn round, at 180 degrees twice this [toy]
MIN_EXPECTED = 1e-2  # [p.e.] fainter pairs of event and DOM are dropped

# electronics
TIME_JITTER = 3.0  # [ns] tube and clock together [PMT]
MERGE_TIME = 8  # [ns] photons of a DOM in the same bin of this width make one pulse [toy]
SATURATION = 5000.0  # [p.e.] that a tube delivers at most in an event [toy, from the largest charges of K]
MAX_PHOTONS = 300  # drawn per source and DOM; brighter light makes each of them heavier
CHARGE_MEAN, CHARGE_WIDTH = 1.0, 0.3  # [p.e.] Gaussian part of the single-photon charge [SPE]
LOW_CHARGE_SHARE, LOW_CHARGE_MEAN = 0.25, 0.3  # exponential part [p.e.] [SPE]
CHARGE_MIN, CHARGE_STEP = 0.025, 0.05  # [p.e.] the values that occur [K]
NOISE_RATE = 5e-7  # [1/ns] dark pulses of one DOM, about 500 Hz [D]
COINCIDENCE_TIME = 1000  # [ns] [D]
COINCIDENCE_REACH = 2  # neighbours up and down a string [D]
TRIGGER_PULSES, TRIGGER_TIME = 8, 5000  # [ns] coincident pulses within this time start the readout [D]
READOUT_BEFORE, READOUT_AFTER = 4000, 6000  # [ns] kept before the first and after the last of them [D]
TRIGGER_AT, TRIGGER_SHAKE = 10_000, 300  # [ns] where the trigger stands on the event's clock, give or take [K]
MAX_PULSES = 100_000  # per event; drawn again beyond it, near the largest of [K]
EVENT_ID_STEP = 16  # mean step between event ids [K]

CHUNK = 128  # events drawn at once: large enough for numpy, small enough for the cache
EVENTS_PER_GROUP = 4000  # events in memory and in a row group of the parquet file
BLOCK = 10  # consecutive DOMs that are looked at together first, whether light reaches them


@dataclass
class SimulateConfig:
    out_dir: str = "data/demo_raw"  # where to write
    n_events: int = 200_000  # labelled events in train/; all have triggered
    events_per_batch: int = 10_000  # per file; Kaggle has 200,000
    n_test_events: int = 1000  # unlabelled events in test/, 0 for none
    seed: int = 1  # batch b is a function of seed and b
    geometry: str = ""  # path of a sensor_geometry.csv (sensor_id,x,y,z), "" = built in
    workers: int = 0  # processes, 0 = one a core

    def check(self):
        yield from check_positive(self, "n_events", "events_per_batch")
        yield from check_not_negative(self, "n_test_events", "seed", "workers")


# ----------------------------------------------------------------------------------------------------------------------
# geometry
# ----------------------------------------------------------------------------------------------------------------------

def build_geometry() -> np.ndarray:
    """DOM positions (N_DOMS, 3) [m] from the design numbers; row = sensor_id = (string - 1) * 60 + DOM - 1, top first."""
    right, up = np.deg2rad(GRID_ANGLE), np.deg2rad(GRID_ANGLE + 60)  # the two steps of the triangular grid
    strings = []
    for row, length in enumerate(ROW_LENGTHS):
        column = np.arange(length) - min(row, 4)  # rows begin further left up to the fifth, the widest
        strings.append(np.stack([column * np.cos(right) + row * np.cos(up), column * np.sin(right) + row * np.sin(up)], 1))
    strings = STRING_SPACING * np.concatenate(strings)  # (78, 2)
    strings -= strings.mean(0)
    # DeepCore: two strings close to the central one, six in the middles of the triangles around it
    angle = np.deg2rad(GRID_ANGLE + np.array([-120, -60, 90, 30, -30, -90, -150, 150]))
    radius = STRING_SPACING / np.sqrt([9, 9, 3, 3, 3, 3, 3, 3])[:, None]
    deepcore = strings[CENTRAL_STRING - 1] + radius * np.stack([np.cos(angle), np.sin(angle)], 1)  # (8, 2)

    dom = np.arange(DOMS_PER_STRING)
    z = np.tile(TOP_DOM_Z - DOM_SPACING * dom, (len(strings), 1))
    below = dom - DEEPCORE_CAP_DOMS
    cap_end = DEEPCORE_TOP_Z - DEEPCORE_CAP_SPACING * (DEEPCORE_CAP_DOMS - 1)
    z_deepcore = np.where(below < 0, DEEPCORE_TOP_Z - DEEPCORE_CAP_SPACING * dom,
                          cap_end - DEEPCORE_GAP - DEEPCORE_SPACING * below)
    z = np.concatenate([z, np.tile(z_deepcore, (len(deepcore), 1))])  # (86, 60)
    xy = np.repeat(np.concatenate([strings, deepcore]), DOMS_PER_STRING, axis=0)
    return np.round(np.column_stack([xy, z.ravel()]), 2)


def read_geometry(path: str) -> np.ndarray:
    """DOM positions (N_DOMS, 3) [m] of a sensor_geometry.csv, its rows in any order."""
    try:
        table = pyarrow.csv.read_csv(path)
        rows = np.column_stack([table[name].to_numpy().astype(float) for name in ("sensor_id", "x", "y", "z")])
    except (OSError, KeyError, ValueError) as error:  # ArrowInvalid is a ValueError
        fail(f"{path}: not a readable sensor_geometry.csv with columns sensor_id,x,y,z ({str(error).splitlines()[0]})")
    rows = rows[np.argsort(rows[:, 0], kind="stable")]
    if not np.array_equal(rows[:, 0], np.arange(N_DOMS)) or not np.isfinite(rows).all():
        fail(f"{path}: need sensor_id 0 to {N_DOMS - 1}, each once, with finite x,y,z [m]; found {len(rows)} rows")
    return rows[:, 1:]


# ----------------------------------------------------------------------------------------------------------------------
# events
# ----------------------------------------------------------------------------------------------------------------------

def dot(a, b):
    return a[0] * b[0] + a[1] * b[1] + a[2] * b[2]  # no BLAS: its sums differ by machine


def draw_events(n: int, rng) -> dict:
    """n neutrinos that interact in or near the detector. A cascade is a track event without its muon."""
    azimuth, zenith = 2 * np.pi * rng.random(n), np.arccos(1 - 2 * rng.random(n))  # isotropic, where it came from
    flight = -np.stack([np.cos(azimuth) * np.sin(zenith), np.sin(azimuth) * np.sin(zenith), np.cos(zenith)])
    steepness = 1 - SPECTRAL_INDEX
    ratio = (ENERGY_MAX / ENERGY_MIN) ** steepness
    energy = ENERGY_MIN * (1 + rng.random(n) * (ratio - 1)) ** (1 / steepness)
    is_track = rng.random(n) < TRACK_SHARE
    muon_energy = is_track * energy * (1 - rng.random(n) ** INELASTICITY_POWER)

    radius, angle = VOLUME_RADIUS * np.sqrt(rng.random(n)), 2 * np.pi * rng.random(n)
    height = VOLUME_HALF_HEIGHT * (2 * rng.random(n) - 1)
    vertex = np.stack([radius * np.cos(angle), radius * np.sin(angle), height])
    muon_range = np.log1p(muon_energy * RADIATION / IONISATION) / RADIATION  # [m] where dE/dx = a + b E has used it up
    back = muon_range * rng.random(n) * (rng.random(n) < THROUGH_SHARE)
    vertex -= back * flight
    return dict(azimuth=azimuth, zenith=zenith, flight=flight, vertex=vertex, energy=energy, muon_energy=muon_energy,
                cascade_energy=energy - muon_energy, event_class=np.where(is_track, 1, 2).astype(np.uint8))


# ----------------------------------------------------------------------------------------------------------------------
# light: expected photons, arrival time of the unscattered light, path and dirt on it, for pairs of event and DOM
# ----------------------------------------------------------------------------------------------------------------------

def dirt_integral(z):
    """Integral over depth of the dust relative to the upper ice: a step from deep to upper ice, and the dust layer."""
    x = (z - DUST_LAYER_Z) / DUST_LAYER_WIDTH
    root = np.sqrt(1 + x * x)  # the step is x / root, the layer 1 / root^3: bell-shaped, and integrals without exp
    return (1 + DEEP_DIRT) / 2 * z + DUST_LAYER_WIDTH * ((1 - DEEP_DIRT) / 2 * root + DUST_LAYER_DIRT * x / root)


def mean_dirt(z_from, z_to):
    """Dust between two depths relative to the upper ice. Both coefficients, scattering and absorption, grow with it."""
    z_from = np.where(np.abs(z_to - z_from) < 0.1, z_to - 0.1, z_from)
    return (dirt_integral(z_to) - dirt_integral(z_from)) / (z_to - z_from)


CONE = np.arccos(1 / REFRACTIVE_INDEX)  # [rad] Cherenkov angle, 41 degrees
DIFFUSION_LENGTH = SCATTERING_LENGTH / 3  # [m]
DECAY_LENGTH = np.sqrt(ABSORPTION_LENGTH * SCATTERING_LENGTH / 3)  # [m] absorption of light that walks at random


def point_light(distance, dirt):
    """Photons/m^2 per photon of a point source: 1/r^2 close by, exp(-r/decay)/r where the light has become diffuse."""
    r = distance * dirt / DIFFUSION_LENGTH
    return np.exp(-distance * dirt / DECAY_LENGTH) * r / np.tanh(r) / (4 * np.pi * distance ** 2)


def line_light(distance, dirt):
    """Photons/m^2 per photon/m of a track: 1/r close by, exp(-r/decay)/sqrt(r) where the light has become diffuse."""
    length = (DIFFUSION_LENGTH / np.sin(CONE)) ** 2 * 2 / (np.pi * DECAY_LENGTH)
    r = np.sqrt(distance * dirt / length)
    return np.exp(-distance * dirt / DECAY_LENGTH) * r / np.tanh(r) / (2 * np.pi * np.sin(CONE) * distance)


def reach(light, strength):
    """How far a source can be seen at all: where it falls to MIN_EXPECTED in the clearest ice. (n,) -> (n,) [m]"""
    distance = np.geomspace(1, 2000, 400)
    brightest = light(distance, DEEP_DIRT) * DOM_AREA
    return np.interp(np.log(strength + 1e-9) - np.log(MIN_EXPECTED), -np.log(brightest), distance)


def response(dom, direction_z):
    return DOM_AREA * (1 + UPWARD_RESPONSE * direction_z) * np.where(dom >= 78 * DOMS_PER_STRING, DEEPCORE_EFFICIENCY, 1)


def pairs_in_reach(distance_squared, limit, doms):
    """Pairs of event and DOM closer than limit (n_events,) [m], found by blocks of DOMs first -> event, dom (n_pairs,).

    distance_squared(points (3, ...), event (...)) is the event's distance to points [m^2].
    """
    blocks = doms.reshape(3, -1, BLOCK)  # (3, n_blocks, BLOCK)
    center = blocks.mean(2)
    radius = np.sqrt(((blocks - center[:, :, None]) ** 2).sum(0).max(1))  # (n_blocks,)
    event = np.arange(len(limit))[:, None]
    event, block = np.nonzero(distance_squared(center[:, None], event) < (limit[event] + radius) ** 2)
    near = distance_squared(blocks[:, block], event[:, None]) < limit[event, None] ** 2  # (n, BLOCK)
    row, dom = np.divmod(np.flatnonzero(near), BLOCK)
    return event[row], block[row] * BLOCK + dom


def cascade_light(vertex, flight, energy, doms):
    """Light of cascades at vertex (3, n) -> event, dom, expected photons, time [ns], path [m], dirt; one per pair."""
    def distance_squared(points, event):
        from_vertex = points - vertex[:, event]
        return dot(from_vertex, from_vertex)

    event, dom = pairs_in_reach(distance_squared, reach(point_light, PHOTONS_PER_GEV * energy), doms)
    to_dom = doms[:, dom] - vertex[:, event]
    distance = np.sqrt(dot(to_dom, to_dom) + 1)  # + 1 m^2: never zero
    dirt = mean_dirt(vertex[2, event], doms[2, dom])
    cosine = dot(to_dom, flight[:, event]) / distance
    shape = 1 + CASCADE_FORWARD * np.exp(-distance * dirt / (4 * SCATTERING_LENGTH)) * cosine
    expected = PHOTONS_PER_GEV * energy[event] * point_light(distance, dirt) * shape * response(dom, to_dom[2] / distance)
    time = distance * REFRACTIVE_INDEX / LIGHT_SPEED
    return event, dom, expected, time, distance * (1 + CASCADE_TURN * (1 - cosine)), dirt


def track_light(vertex, flight, energy, doms, rng):
    """Light of muons that start at vertex (3, n) -> the same as cascade_light; time 0 is the muon at the vertex."""
    def distance_squared(points, event):
        from_vertex = points - vertex[:, event]
        return dot(from_vertex, from_vertex) - dot(from_vertex, flight[:, event]) ** 2

    strength = PHOTONS_PER_METRE + PHOTONS_PER_GEV * RADIATION * energy
    event, dom = pairs_in_reach(distance_squared, reach(line_light, strength), doms)
    to_dom = doms[:, dom] - vertex[:, event]
    along = dot(to_dom, flight[:, event])
    distance = np.sqrt(np.maximum(dot(to_dom, to_dom) - along ** 2, 0) + 1)  # + 1 m^2: never zero
    emitted = along - distance / np.tan(CONE)  # [m] from the vertex, where the light that gets here starts
    remaining = (energy[event] + IONISATION / RADIATION) * np.exp(-RADIATION * emitted) - IONISATION / RADIATION
    lit = np.flatnonzero((emitted > 0) & (remaining > 0))  # after the vertex, before the muon has stopped
    event, dom, along, distance, emitted, remaining = (
        values[lit] for values in (event, dom, along, distance, emitted, remaining))

    lumps = rng.lognormal(-LUMP_SPREAD ** 2 / 2, LUMP_SPREAD, (vertex.shape[1], 256))  # mean 1
    lump = lumps[event, (emitted / LUMP_LENGTH).astype(int) % 256]
    photons = PHOTONS_PER_METRE + PHOTONS_PER_GEV * RADIATION * remaining * lump  # per metre of track
    path = distance / np.sin(CONE)
    z_emitted = vertex[2, event] + emitted * flight[2, event]
    dirt = mean_dirt(z_emitted, doms[2, dom])
    expected = photons * line_light(distance, dirt) * response(dom, (doms[2, dom] - z_emitted) / path)
    time = (along + distance * np.tan(CONE)) / LIGHT_SPEED
    return event, dom, expected, time, path, dirt


def draw_photons(light, rng):
    """Photons that are detected -> event, dom, time [ns], weight (photons each of them stands for); unsorted."""
    event, dom, expected, time, path, dirt = light
    n = rng.poisson(expected / (1 + expected / SATURATION))
    hit = np.flatnonzero(n)
    drawn = np.minimum(n[hit], MAX_PHOTONS)
    pair = np.repeat(hit, drawn)
    speed = LIGHT_SPEED / REFRACTIVE_INDEX
    scale = 1 / (1 / PANDEL_TIME + speed * dirt[pair] / ABSORPTION_LENGTH)  # long detours are absorbed on the way
    delay = scale * rng.standard_gamma(path[pair] * dirt[pair] / PANDEL_LENGTH)
    return event[pair], dom[pair], time[pair] + delay, np.repeat(n[hit] / drawn, drawn)


# ----------------------------------------------------------------------------------------------------------------------
# pulses
# ----------------------------------------------------------------------------------------------------------------------

def draw_noise(event, time, rng):
    """Dark pulses around the light of each event -> event, dom, time [ns]."""
    lit, index = np.unique(event, return_inverse=True)
    first, last = np.full(len(lit), np.inf), np.full(len(lit), -np.inf)
    np.minimum.at(first, index, time)
    np.maximum.at(last, index, time)
    span = last - first + READOUT_BEFORE + READOUT_AFTER
    n = rng.poisson(NOISE_RATE * N_DOMS * span)
    noise = np.repeat(np.arange(len(lit)), n)
    time = first[noise] - READOUT_BEFORE + span[noise] * rng.random(len(noise))
    return lit[noise], rng.integers(N_DOMS, size=len(noise)), time


def merge_photons(event, dom, time, weight, rng):
    """Photons -> pulses: event, dom, time (int64 [ns]), charge [p.e.], ordered by event, dom, time."""
    time = np.floor(time + TIME_JITTER * rng.standard_normal(len(time))).astype(np.int64)
    origin = time.min() // MERGE_TIME * MERGE_TIME
    span = (time.max() - origin) // MERGE_TIME * MERGE_TIME + MERGE_TIME  # a multiple, so that key // MERGE_TIME is a bin
    key = (event * N_DOMS + dom) * span + time - origin
    order = np.argsort(key, kind="stable")
    key = key[order]
    first = np.flatnonzero(np.diff(key // MERGE_TIME, prepend=-1))
    charge = CHARGE_MEAN + CHARGE_WIDTH * rng.standard_normal(len(key))
    low = rng.random(len(key)) < LOW_CHARGE_SHARE
    charge[low] = LOW_CHARGE_MEAN * rng.standard_exponential(low.sum())
    charge = np.add.reduceat(np.abs(charge) * weight[order], first)
    charge = np.round(CHARGE_MIN + CHARGE_STEP * np.floor(charge / CHARGE_STEP), 3)
    channel, time = np.divmod(key[first], span)
    event, dom = np.divmod(channel, N_DOMS)
    return event, dom, time + origin, charge


def local_coincidence(event, dom, time) -> np.ndarray:
    """True where a neighbour on the string, one or two DOMs up or down, has a pulse of the same event within 1 us.

    event, dom (0..N_DOMS - 1), time [ns] are integer arrays (n,) with the pulses of many events, in any order -> (n,) bool.
    """
    if len(time) == 0:
        return np.zeros(0, bool)
    event, dom, time = (np.asarray(values, dtype=np.int64) for values in (event, dom, time))
    time = time - time.min()
    step = time.max() + COINCIDENCE_TIME + 1  # from one DOM to the next: keys within 1 us are of the same DOM
    key = ((event - event.min()) * N_DOMS + dom) * step + time
    order = np.argsort(key)
    key, height = key[order], dom[order] % DOMS_PER_STRING
    found = np.zeros(len(key), dtype=bool)
    for offset in range(-COINCIDENCE_REACH, COINCIDENCE_REACH + 1):
        if offset != 0:
            # the first pulse of that neighbour which is not too early; it counts if it is not too late either
            wanted = key + offset * step - COINCIDENCE_TIME
            candidate = np.minimum(np.searchsorted(key, wanted), len(key) - 1)
            on_string = (height + offset >= 0) & (height + offset < DOMS_PER_STRING)
            gap = key[candidate] - wanted
            found |= on_string & (gap >= 0) & (gap <= 2 * COINCIDENCE_TIME)
    result = np.empty_like(found)
    result[order] = found
    return result


# ----------------------------------------------------------------------------------------------------------------------
# trigger
# ----------------------------------------------------------------------------------------------------------------------

def trigger(event, dom, time, charge, aux, rng):
    """Keep the readout of events that trigger -> the same columns, by event and time, the trigger near TRIGGER_AT."""
    origin = time.min()
    span = time.max() - origin + 1
    order = np.argsort((event * span + time - origin) * N_DOMS + dom)  # dom makes the key unique, so that ties are settled
    event, dom, time, charge, aux = (values[order] for values in (event, dom, time, charge, aux))

    good = np.flatnonzero(~aux)
    first, last = good[:len(good) - TRIGGER_PULSES + 1], good[TRIGGER_PULSES - 1:]
    fired = (event[first] == event[last]) & (time[last] - time[first] <= TRIGGER_TIME)
    first, last = first[fired], last[fired]
    n = int(event.max()) + 1
    start, end = np.full(n, np.iinfo(np.int64).max), np.zeros(n, np.int64)  # events that do not trigger: empty window
    start[event[first][::-1]] = time[first][::-1]  # the earliest is written last
    end[event[last]] = time[last]
    keep = (time >= start[event] - READOUT_BEFORE) & (time <= end[event] + READOUT_AFTER)
    keep &= (np.bincount(event[keep], minlength=n) <= MAX_PULSES)[event]
    time = time - start[event] + TRIGGER_AT + rng.integers(-TRIGGER_SHAKE, TRIGGER_SHAKE + 1, n)[event]
    return tuple(values[keep] for values in (event, dom, time, charge, aux))


def simulate_chunk(doms, rng):
    """CHUNK interactions -> (pulses of those that triggered as columns, events numbered from 0; their truth as a dict)."""
    events = draw_events(CHUNK, rng)
    photons = []
    for energy, light, extra in ((events["cascade_energy"], cascade_light, ()), (events["muon_energy"], track_light, (rng,))):
        rows = np.flatnonzero(energy)  # cascades have no muon
        event, *columns = light(events["vertex"][:, rows], events["flight"][:, rows], energy[rows], doms, *extra)
        photons.append(draw_photons((rows[event], *columns), rng))
    event, dom, time, weight = (np.concatenate(columns) for columns in zip(*photons))
    enough = (np.bincount(event, minlength=CHUNK) >= TRIGGER_PULSES)[event]  # the rest can hardly trigger: save the work
    event, dom, time, weight = (values[enough] for values in (event, dom, time, weight))

    noise_event, noise_dom, noise_time = draw_noise(event, time, rng)
    event, dom, time = (np.concatenate(pair) for pair in ((event, noise_event), (dom, noise_dom), (time, noise_time)))
    weight = np.concatenate([weight, np.ones(len(noise_time))])
    event, dom, time, charge = merge_photons(event, dom, time, weight, rng)
    aux = ~local_coincidence(event, dom, time)
    event, *columns = trigger(event, dom, time, charge, aux, rng)
    triggered, event = np.unique(event, return_inverse=True)
    return (event, *columns), {name: values[..., triggered] for name, values in events.items()}


def simulate_events(n, doms, rng):
    """Exactly n triggered events: (event 0..n-1, dom, time, charge, aux) of the pulses, and a dict of their truth."""
    doms = np.ascontiguousarray(doms.T)
    chunks, n_found = [], 0
    while n_found < n:
        (event, *columns), truth = simulate_chunk(doms, rng)
        chunks.append(((event + n_found, *columns), truth))
        n_found += len(truth["energy"])
    pulses, truths = zip(*chunks)
    event, *columns = (np.concatenate(values) for values in zip(*pulses))
    end = np.searchsorted(event, n)  # the surplus of the last chunk is dropped
    truth = {name: np.concatenate([truth[name] for truth in truths], axis=-1)[..., :n] for name in truths[0]}
    return (event[:end], *(values[:end] for values in columns)), truth


# ----------------------------------------------------------------------------------------------------------------------
# files
# ----------------------------------------------------------------------------------------------------------------------

PULSE_COLUMNS = {"sensor_id": "int16", "time": "int64", "charge": "float64", "auxiliary": "bool", "event_id": "int64"}
PULSE_SCHEMA = pa.schema([(name, pa.type_for_alias(kind)) for name, kind in PULSE_COLUMNS.items()], metadata={
    "pandas": json.dumps({  # tells pandas.read_parquet that event_id is the index, as in Kaggle's files
        "index_columns": ["event_id"], "column_indexes": [], "pandas_version": "1.5.0", "creator": {"library": "pyarrow"},
        "columns": [{"name": name, "field_name": name, "pandas_type": kind, "numpy_type": kind, "metadata": None}
                    for name, kind in PULSE_COLUMNS.items()]})})
META_SCHEMA = pa.schema([
    ("batch_id", pa.int64()), ("event_id", pa.int64()),
    ("first_pulse_index", pa.int64()), ("last_pulse_index", pa.int64()),  # in the batch file, inclusive
    ("azimuth", pa.float64()), ("zenith", pa.float64()),  # [rad] where the neutrino came from
    ("energy", pa.float64()), ("event_class", pa.uint8()),  # [GeV], 1 track 2 cascade; Kaggle has neither
])


def simulate_batch(out_dir, split, batch, first_event, n_events, seed, doms):
    """Write one batch file and its part of the meta table -> n_events. A function of seed and batch alone."""
    rng = np.random.default_rng(np.random.SeedSequence([seed, batch]))
    meta = []

    def write_pulses(path):
        n_done = n_pulses = 0
        # dictionaries suit columns of few values; for time building one only costs
        with pq.ParquetWriter(path, PULSE_SCHEMA, use_dictionary=["sensor_id", "charge", "event_id"]) as writer:
            while n_done < n_events:
                n = min(EVENTS_PER_GROUP, n_events - n_done)
                (event, dom, time, charge, aux), truth = simulate_events(n, doms, rng)
                event_id = (first_event + n_done + np.arange(n)) * EVENT_ID_STEP + rng.integers(EVENT_ID_STEP, size=n)
                end = n_pulses + np.cumsum(np.bincount(event, minlength=n))
                writer.write_table(pa.table([dom.astype(np.int16), time, charge, aux, event_id[event]], schema=PULSE_SCHEMA))
                meta.append(pa.table([np.full(n, batch), event_id, np.append(n_pulses, end[:-1]), end - 1, truth["azimuth"],
                                      truth["zenith"], truth["energy"], truth["event_class"]], schema=META_SCHEMA))
                n_done, n_pulses = n_done + n, end[-1]

    data_path, meta_path = batch_paths(out_dir, split, batch)
    write_atomic(data_path, write_pulses)
    write_atomic(meta_path, lambda path: pq.write_table(pa.concat_tables(meta), path))  # last: it says that both are done
    return n_events


def batch_paths(out_dir, split, batch):
    return out_dir / split / f"batch_{batch}.parquet", out_dir / ".parts" / f"meta_{batch}.parquet"


def join_meta(path, parts, columns):
    """One meta table from those of the batches -> pulses of each event."""
    lengths = []
    schema = pa.schema([META_SCHEMA.field(name) for name in columns])

    def write(part):
        with pq.ParquetWriter(part, schema) as writer:
            for table in map(pq.read_table, parts):
                writer.write_table(table.select(columns))
                lengths.append(table["last_pulse_index"].to_numpy() - table["first_pulse_index"].to_numpy() + 1)
    write_atomic(path, write)
    return np.concatenate(lengths)


# ----------------------------------------------------------------------------------------------------------------------
# main
# ----------------------------------------------------------------------------------------------------------------------

def end_with_parent():
    """Let a worker end when the main process does, even if that was killed and could not say so."""
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def run_batches(tasks, workers, bar):
    """Run simulate_batch on each task in worker processes; they stop with the first error or Ctrl-C."""
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), initializer=end_with_parent) as pool:
        try:
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # inherited by the workers: Ctrl-C is the main process's business
            futures = [pool.submit(simulate_batch, *task) for task in tasks]
            signal.signal(signal.SIGINT, signal.default_int_handler)
            for future in as_completed(futures):
                bar.update(future.result())
        except BaseException as error:
            for worker in multiprocessing.active_children():
                worker.terminate()
            if isinstance(error, KeyboardInterrupt):
                fail("stopped; finished batches are kept, the same command goes on from there")
            if isinstance(error, BrokenProcessPool):
                fail("a worker was killed, perhaps for lack of memory; the same command goes on, try fewer --workers")
            raise


def main():
    config = load_config(SimulateConfig, __doc__)
    doms = read_geometry(config.geometry) if config.geometry else build_geometry()
    out_dir = Path(config.out_dir)

    # which batch holds which events; the test batches go on counting, as Kaggle's do
    tasks = []
    for split, first, n in (("train", 0, config.n_events), ("test", config.n_events, config.n_test_events)):
        for start in range(0, n, config.events_per_batch):
            n_batch = min(config.events_per_batch, n - start)
            tasks.append((out_dir, split, len(tasks) + 1, first + start, n_batch, config.seed, doms))
    splits = ["train", "test"] if config.n_test_events else ["train"]
    outputs = [out_dir / "sensor_geometry.csv"] + [out_dir / f"{split}_meta.parquet" for split in splits]

    # everything that the bytes depend on: the knobs, the geometry, and the constants above, which readers will change
    settings = {key: value for key, value in asdict(config).items() if key not in ("out_dir", "workers", "geometry")}
    settings["geometry_crc32"] = zlib.crc32(doms.astype("<f8").tobytes())
    settings |= {name: value for name, value in globals().items()
                 if name.isupper() and isinstance(value, (int, float, tuple)) and not name.startswith("_")}
    settings = json.loads(json.dumps(settings))  # as it will be read back
    record = out_dir / "simulate.json"
    if record.exists():
        found = read_json(record)
        for key, value in settings.items():
            if found.get(key) != value:
                fail(f"{out_dir} holds data of {key} = {found.get(key)}, now it is {value}; choose another --out_dir, "
                     f"or remove that folder")
        if found["complete"] and all(path.exists() for path in outputs + [batch_paths(*task[:3])[0] for task in tasks]):
            print(f"{out_dir} is complete, nothing to do")
            return
    elif any((out_dir / name).exists() for name in ("train", "test", "train_meta.parquet", "sensor_geometry.csv")):
        fail(f"{out_dir} holds data that simulate.py did not write; choose another --out_dir")

    write_json(record, {"complete": False} | settings)
    lines = ["sensor_id,x,y,z"] + [f"{dom},{x},{y},{z}" for dom, (x, y, z) in enumerate(doms.tolist())]
    write_atomic(out_dir / "sensor_geometry.csv", lambda path: path.write_text("\n".join(lines) + "\n"))

    todo = [task for task in tasks if not all(path.exists() for path in batch_paths(*task[:3]))]
    n_total, n_todo = sum(task[4] for task in tasks), sum(task[4] for task in todo)
    with progress_bar(n_total, "simulate", "event", initial=n_total - n_todo) as bar:
        run_batches(todo, min(config.workers or os.cpu_count(), len(todo) or 1), bar)

    for split in splits:
        parts = [batch_paths(*task[:3])[1] for task in tasks if task[1] == split]
        columns = META_SCHEMA.names if split == "train" else META_SCHEMA.names[:4]
        lengths = join_meta(out_dir / f"{split}_meta.parquet", parts, columns)
        print(f"{out_dir}/{split}: {len(lengths):,} events in {len(parts)} files, {lengths.sum():,} pulses, "
              f"median {np.median(lengths):.0f} an event")
    write_json(record, {"complete": True} | settings)
    shutil.rmtree(out_dir / ".parts")


if __name__ == "__main__":
    main()
