"""Stage 0: a toy IceCube. It writes event files in the Kaggle layout, so that all runs without a download.

    python simulate.py                                               # 200,000 events into data/demo_raw
    python simulate.py --n_events=2000 --events_per_batch=500 --out_dir=data/tiny_raw
    python simulate.py --geometry=sensor_geometry.csv --out_dir=data/true_raw    # any detector, from a file
    python simulate.py --scattering=1.3 --afterpulses=0.06 --out_dir=data/real_raw   # other ice, other tubes

Prints a bar and what was written. The bytes are the same for any number of workers. A run that was stopped
goes on from its finished batches; a complete folder is left as it is.

What it is: a muon or a cascade at a random place, light that falls with distance and comes late by
scattering, noise, local coincidence, a trigger. Enough for pulses that look like the real ones and carry
direction and energy. What it is not: a simulation of IceCube. No photon is tracked, the ice is one curve,
energies and event classes are mixed so that events look right; no cosmic-ray muons, no broken DOMs,
afterpulses only if asked for. No physics result may rest on it. Ice and tubes have knobs: two folders can
differ by known amounts, as data and their simulation do by unknown ones.
"""
import json
import os
import shutil
import zlib
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from common import (check_settings, count_cores, count_events, fail, hold_lock, progress_bar,
                    read_json, run_in_workers, run_stage, write_atomic, write_json)
from knobs import check_not_negative, check_positive, load_config, print_knobs
from tables import ICECUBE_DOMS, ICECUBE_DOMS_PER_STRING, Detector, read_detector

# Sources: [D] the detector, arXiv:1612.05093; [DC] DeepCore, arXiv:1109.6096; [A] AMANDA's track
# reconstruction, astro-ph/0407044; [I] the ice, arXiv:1301.5361; [PMT] arXiv:1002.2442; [SPE]
# arXiv:2002.00997; [PDG] Review of Particle Physics; [K] read off the Kaggle files; [toy] chosen by us so
# that the pulses look right.

# detector
ROW_LENGTHS = (6, 7, 8, 9, 10, 10, 9, 8, 7, 4)  # strings 1..78, row by row as seen from above [D]
STRING_SPACING = 125.0  # [m] of the triangular grid [D]
GRID_ANGLE = 9.0  # [degree] of its rows against the x axis, read off a figure [D]
TOP_Z = 500.0  # [m] of the first DOM, 1450 m deep; z = 0 is 1948 m deep [D]
DOM_SPACING = 17.02  # [m] along strings 1..78 [D]
CENTRAL_STRING = 36  # strings 79..86, DeepCore, stand around it [DC]
DEEPCORE_TOP_Z = 188.0  # [m] of the first DOM of a DeepCore string, 1760 m deep [DC]
DEEPCORE_CAP, DEEPCORE_CAP_SPACING = 10, 10.0  # so many DOMs at the top, so many [m] apart [DC]
DEEPCORE_GAP = 257.0  # [m] below them, across the dust layer [DC]
DEEPCORE_SPACING = 7.0  # [m] of the other 50 DOMs [DC]
DEEPCORE_EFFICIENCY = 1.35  # of its tubes against the others [DC]
DOM_AREA = 1.2e-3  # [m^2] for a photon, mean over directions; rough: tube size x efficiency [PMT]
UPWARD_RESPONSE = 0.5  # tubes look down: response 1 + 0.5 cos for light that moves up [toy]

# neutrinos
ENERGY_MIN, ENERGY_MAX = 1e2, 5e6  # [GeV]
SPECTRAL_INDEX = 1.9  # dN/dE ~ E^-1.9, flatter than nature's [toy]
TRACK_SHARE = 0.5  # of the interactions: those with a muon [toy]
THROUGH_SHARE = 0.5  # of these: those that lie outside the volume, so that the muon comes in [toy]
# [m] of the cylinder that holds the other vertices; it grows and shrinks with the detector [toy]
VOLUME_RADIUS, VOLUME_HALF_HEIGHT = 600.0, 600.0
INELASTICITY_POWER = 1.5  # a track's vertex cascade takes the share u^1.5 of the energy, 0.4 on average [toy]
IONISATION, RADIATION = 0.24, 3.3e-4  # [GeV/m], [1/m] muon in ice: dE/dx = 0.24 + 3.3e-4 E [PDG]

# light
LIGHT_SPEED = 0.299792458  # [m/ns] [PDG]
REFRACTIVE_INDEX = 1.33  # of ice; phase and group velocity are taken as equal [A]
PHOTONS_PER_METRE = 3e4  # of a bare muon, 300-600 nm [PDG]
PHOTONS_PER_GEV = 1.4e5  # of a cascade, which is like 5 m of muon per GeV (arXiv:1210.5140)
SCATTERING_LENGTH, ABSORPTION_LENGTH = 27.0, 110.0  # [m] effective, above the dust layer; rounded from [I]
DEEP_DIRT = 0.55  # dust below the layer relative to above it: the deep ice is the clearest [I]
DUST_Z, DUST_WIDTH = -102.0, 40.0  # [m] middle and width of the dust layer, 2000-2100 m deep [I]
DUST_DIRT = 3.5  # what the layer adds where it is worst, relative to the ice above it [I]
PANDEL_LENGTH, PANDEL_TIME = 33.3, 557.0  # [m], [ns] scattering delay: gamma law of shape path / 33.3 m [A]
# mean cosine between a cascade and the photons it emits, integrated over a profile that other code ascribes
# to arXiv:1210.5140; not checked against the paper's table
CASCADE_COSINE = 0.66
MIN_EXPECTED = 1e-2  # [p.e.] sources are followed to where a mean DOM sees this

# electronics
SATURATION = 5000.0  # [p.e.] the most that a tube delivers [toy, after the largest charges of K]
TIME_JITTER = 3.0  # [ns] of tube and clock [PMT]
MERGE_TIME = 8  # [ns] photons of a DOM in such a bin become one pulse [toy]
CHARGE_MEAN, CHARGE_WIDTH = 1.0, 0.3  # [p.e.] of a photon: a Gaussian [SPE]
LOW_CHARGE_SHARE, LOW_CHARGE_MEAN = 0.25, 0.3  # of the photons; [p.e.] these have an exponential [SPE]
CHARGE_MIN, CHARGE_STEP = 0.025, 0.05  # [p.e.] the values that occur [K]
NOISE_RATE = 5e-7  # [1/ns] dark pulses of a DOM, about 500 Hz [D]
AFTERPULSE_DELAY = 300, 11_000  # [ns] after its photo-electron, uniform; real ones come in peaks [toy]
TRIGGER_PULSES, TRIGGER_TIME = 8, 5000  # so many coincident pulses within so many [ns] [D]
READOUT_BEFORE, READOUT_AFTER = 4000, 6000  # [ns] kept before the trigger's first, after its last pulse [D]
TRIGGER_AT, TRIGGER_SHAKE = 10_000, 300  # [ns] its first pulse on the event's clock, give or take [K]
MAX_PULSES = 100_000  # an event with more is drawn anew [K]
MAX_PHOTONS = 300  # drawn one by one for a DOM and source; if there are more, each stands for several
EVENT_ID_STEP = 16  # between event ids, on average [K]

# work: pieces that suit cache and memory
CHUNK = 128  # interactions drawn at once
BLOCK = 6  # DOMs whose distance to an event is tested at once
EVENTS_PER_GROUP = 4000  # written at once


@dataclass
class SimulateConfig:
    out_dir: str = "data/demo_raw"  # folder to write
    n_events: int = 200_000  # labelled events in train/, all of them triggered
    events_per_batch: int = 10_000  # per file; Kaggle has 200,000
    n_test_events: int = 1000  # unlabelled events in test/, 0 for none
    seed: int = 1  # batch b depends on seed and b alone
    geometry: str = ""  # a sensor_geometry.csv with sensor_id,x,y,z (and string); "" = IceCube, built in
    workers: int = 0  # processes; 0 = one per core

    energy_min: float = ENERGY_MIN  # [GeV] of the neutrinos; the larger, the more bright events

    # another ice and other tubes, compared with the constants above
    scattering: float = 1.0  # times the built-in ice's: 2 = half the scattering length, twice the delays
    absorption: float = 1.0  # times the built-in ice's: 2 = half the absorption length
    dust: float = 1.0  # times what the dust layer adds to both; 0 = no layer
    efficiency: float = 1.0  # times that of all tubes
    noise: float = 1.0  # times the rate of dark pulses
    afterpulses: float = 0.0  # chance of a late pulse per photo-electron, same DOM; IceCube's clsim: 0.0593

    def check(self):
        yield from check_positive(self, "n_events", "events_per_batch", "scattering", "absorption",
                                  "efficiency")
        yield from check_not_negative(self, "n_test_events", "seed", "workers", "dust", "noise")
        if not 0 < self.energy_min < ENERGY_MAX:
            yield f"energy_min = {self.energy_min}: must lie between 0 and {ENERGY_MAX:g} GeV"
        if not 0 <= self.afterpulses < 1:
            yield f"afterpulses = {self.afterpulses}: must be 0 or a share below 1"


# ------------------------------------------------------------------------------------------------------------
# geometry
# ------------------------------------------------------------------------------------------------------------

def build_geometry():
    """IceCube's DOM positions (5160, 3) [m] by design; sensor_id = row = 60 string + DOM, counted from 0."""
    a, b = np.deg2rad(GRID_ANGLE), np.deg2rad(GRID_ANGLE + 60)  # directions along a row and to the next row
    row = np.repeat(np.arange(len(ROW_LENGTHS)), ROW_LENGTHS)
    begin = -np.minimum(row, 4)  # each row begins half a place further left, up to the fifth
    column = begin + np.concatenate([np.arange(n) for n in ROW_LENGTHS])
    strings = STRING_SPACING * np.stack([column * np.cos(a) + row * np.cos(b),
                                         column * np.sin(a) + row * np.sin(b)], 1)
    strings -= strings.mean(0)  # (78, 2)
    # DeepCore: two strings near the central one, six in the middles of the triangles around it
    angle = np.deg2rad(GRID_ANGLE + np.array([-120, -60, 90, 30, -30, -90, -150, 150]))
    distance = STRING_SPACING / np.sqrt([9, 9, 3, 3, 3, 3, 3, 3])
    offset = np.stack([distance * np.cos(angle), distance * np.sin(angle)], 1)
    deepcore = strings[CENTRAL_STRING - 1] + offset  # (8, 2)

    dom = np.arange(ICECUBE_DOMS_PER_STRING)
    cap_z = DEEPCORE_TOP_Z - DEEPCORE_CAP_SPACING * dom[:DEEPCORE_CAP]
    deep_z = cap_z[-1] - DEEPCORE_GAP - DEEPCORE_SPACING * dom[:len(dom) - DEEPCORE_CAP]
    z = [TOP_Z - DOM_SPACING * dom] * len(strings) + [np.append(cap_z, deep_z)] * len(deepcore)  # 86 x (60,)
    xy = np.repeat(np.concatenate([strings, deepcore]), len(dom), axis=0)
    return np.round(np.column_stack([xy, np.concatenate(z)]), 2)


def choose_detector(path):
    """The Detector of a sensor_geometry.csv, whose rows may be in any order; "": the built-in one."""
    if not path:
        return Detector(np.ascontiguousarray(build_geometry().T),
                        np.arange(ICECUBE_DOMS) // ICECUBE_DOMS_PER_STRING)
    detector = read_detector(Path(path))
    if np.abs(detector.position).max() < 10 or np.abs(detector.position[2]).max() > 1500:
        fail(f"{path}: need x,y,z in m from the middle of the detector, as in Kaggle's sensor_geometry.csv")
    check_sensor_ids(detector, path)
    return detector


def check_sensor_ids(detector, path):
    if len(detector) > np.iinfo(np.int16).max:
        fail(f"{path}: {len(detector):,} DOMs; in Kaggle's layout sensor_id is an int16, so 32,767 at most")


@lru_cache(maxsize=1)
def efficiency_of(detector):
    """Of each DOM against IceCube's usual one, (V,). DeepCore's is known by the detector's size."""
    is_deepcore = (len(detector) == ICECUBE_DOMS) & (detector.string >= 78)
    return np.where(is_deepcore, DEEPCORE_EFFICIENCY, 1.0)


# ------------------------------------------------------------------------------------------------------------
# events: vectors are (3, n), one row a coordinate, for speed
# ------------------------------------------------------------------------------------------------------------

def unit_vector(azimuth, zenith):
    """Angles [rad] of a direction -> unit vectors (3, n)."""
    return np.stack([np.cos(azimuth) * np.sin(zenith), np.sin(azimuth) * np.sin(zenith), np.cos(zenith)])


@lru_cache(maxsize=1)
def volume_of(detector):
    """Radius and half height [m] of the cylinder in which neutrinos interact."""
    (radius, half_height), (icecube_radius, icecube_half_height) = (
        (np.hypot(x, y).max(), np.abs(z).max()) for x, y, z in (detector.position, build_geometry().T))
    return VOLUME_RADIUS * (radius / icecube_radius), VOLUME_HALF_HEIGHT * (half_height / icecube_half_height)


def draw_events(n, volume, energy_min, rng) -> dict:
    """n neutrinos that interact in or near the detector. A track is a cascade at the vertex plus a muon."""
    azimuth, zenith = 2 * np.pi * rng.random(n), np.arccos(1 - 2 * rng.random(n))  # isotropic
    flight = -unit_vector(azimuth, zenith)  # the angles tell where it came from
    power = 1 - SPECTRAL_INDEX
    energy = energy_min * (1 + rng.random(n) * ((ENERGY_MAX / energy_min) ** power - 1)) ** (1 / power)
    is_track = rng.random(n) < TRACK_SHARE
    muon_energy = is_track * energy * (1 - rng.random(n) ** INELASTICITY_POWER)

    radius, angle = volume[0] * np.sqrt(rng.random(n)), 2 * np.pi * rng.random(n)
    vertex = np.stack([radius * np.cos(angle), radius * np.sin(angle),
                       volume[1] * (2 * rng.random(n) - 1)])
    muon_range = np.log1p(muon_energy * RADIATION / IONISATION) / RADIATION  # [m] until dE/dx has used it up
    vertex -= flight * muon_range * rng.random(n) * (rng.random(n) < THROUGH_SHARE)
    return dict(azimuth=azimuth, zenith=zenith, flight=flight, vertex=vertex, energy=energy,
                muon_energy=muon_energy, cascade_energy=energy - muon_energy,
                event_class=np.where(is_track, 1, 2).astype(np.uint8))


def dot(a, b):
    return a[0] * b[0] + a[1] * b[1] + a[2] * b[2]  # no BLAS: its sums differ from machine to machine


def pick(vectors, index):
    return np.stack([row[index] for row in vectors])  # vectors[:, index], four times as fast


# ------------------------------------------------------------------------------------------------------------
# light
# ------------------------------------------------------------------------------------------------------------
# A source gives for each pair of event and DOM: event, dom, expected photons, time of unscattered light [ns],
# path [m], dirt (dust on the way relative to the upper ice).

CONE = np.arccos(1 / REFRACTIVE_INDEX)  # [rad] Cherenkov angle


def lengths_of(config):
    """Of the upper ice, [m]: scattering, diffusion, and decay of light that walks at random."""
    scattering, absorption = SCATTERING_LENGTH / config.scattering, ABSORPTION_LENGTH / config.absorption
    return scattering, scattering / 3, np.sqrt(absorption * scattering / 3)


def dirt_integral(z, dust):
    x = (z - DUST_Z) / DUST_WIDTH
    root = np.sqrt(1 + x * x)  # x / root is a step, 1 / root^3 a bell, and neither integral needs exp
    return (1 + DEEP_DIRT) / 2 * z + DUST_WIDTH * ((1 - DEEP_DIRT) / 2 * root + dust * DUST_DIRT * x / root)


def mean_dirt(z_from, z_to, dust):
    """Dust between two depths relative to the upper ice; scattering and absorption are proportional to it."""
    z_from = np.where(np.abs(z_to - z_from) < 0.1, z_to - 0.1, z_from)
    return (dirt_integral(z_to, dust) - dirt_integral(z_from, dust)) / (z_to - z_from)


def point_light(distance, dirt, config):
    """Photons/m^2 per photon of a cascade: 1/r^2 close by, exp(-r/decay)/r where the light is diffuse."""
    _, diffusion, decay = lengths_of(config)
    r = distance * dirt / diffusion
    return np.exp(-distance * dirt / decay) * r / np.tanh(r) / (4 * np.pi * distance ** 2)


def line_light(distance, dirt, config):
    """Photons/m^2 per photon/m of a track: 1/r close by, exp(-r/decay)/sqrt(r) where the light is diffuse."""
    _, diffusion, decay = lengths_of(config)
    length = (diffusion / np.sin(CONE)) ** 2 * 2 / (np.pi * decay)
    r = np.sqrt(distance * dirt / length)
    return np.exp(-distance * dirt / decay) * r / np.tanh(r) / (2 * np.pi * np.sin(CONE) * distance)


def response(upward):
    return DOM_AREA * (1 + UPWARD_RESPONSE * upward)


def pairs_in_reach(vertex, axis, light, strength, doms, config):
    """Pairs of event and DOM close enough to the line from vertex along axis -> event, dom (n_pairs,).

    A zero axis makes the line a point. Whole blocks of DOMs are tested, so some pairs are too far apart.
    """
    grid = np.geomspace(1, 2000, 400)  # [m]
    clear = light(grid, DEEP_DIRT, config)
    reach = np.interp(np.log(strength / MIN_EXPECTED), -np.log(DOM_AREA * clear), grid)
    n_doms = doms.shape[1]
    full = np.minimum(np.arange(-(-n_doms // BLOCK) * BLOCK), n_doms - 1)  # the last DOM fills the last block
    blocks = pick(doms, full).reshape(3, -1, BLOCK)
    center = blocks.mean(2)  # (3, n_blocks)
    radius = np.sqrt(((blocks - center[:, :, None]) ** 2).sum(0).max(1))
    to_block = center[:, None] - vertex[:, :, None]  # (3, n_events, n_blocks)
    near = dot(to_block, to_block) - dot(to_block, axis[:, :, None]) ** 2 < (reach[:, None] + radius) ** 2
    event, block = np.divmod(np.flatnonzero(near), len(radius))
    event, dom = np.repeat(event, BLOCK), (block[:, None] * BLOCK + np.arange(BLOCK)).ravel()
    if len(full) > n_doms:
        event, dom = event[dom < n_doms], dom[dom < n_doms]
    return event, dom


def cascade_light(vertex, flight, energy, doms, config):
    event, dom = pairs_in_reach(vertex, 0 * flight, point_light, PHOTONS_PER_GEV * energy, doms, config)
    to_dom = pick(doms, dom) - pick(vertex, event)
    distance = np.sqrt(dot(to_dom, to_dom) + 1)  # + 1 m^2: never zero
    cosine = dot(to_dom, pick(flight, event)) / distance
    dirt = mean_dirt(vertex[2][event], doms[2][dom], config.dust)
    # light goes a step forward before it walks at random, so its centre lies ahead of the vertex: DOMs there
    # see more of it, and earlier. slope: of log(point_light) over that step; photons tracked one by one agree
    scattering, diffusion, decay = lengths_of(config)
    ahead = CASCADE_COSINE * scattering / dirt  # [m]
    slope = ahead * dirt / decay + ahead / (distance + diffusion / dirt)
    forward = slope / np.sinh(slope) * np.exp(slope * cosine)  # 1 on average
    photons = PHOTONS_PER_GEV * energy[event] * forward
    expected = photons * point_light(distance, dirt, config) * response(to_dom[2] / distance)
    time = distance * REFRACTIVE_INDEX / LIGHT_SPEED
    return event, dom, expected, time, distance + ahead * (1 - cosine), dirt


def track_light(vertex, flight, energy, doms, config):
    has_muon = energy > 0
    strength = np.where(has_muon, PHOTONS_PER_METRE + PHOTONS_PER_GEV * RADIATION * energy, 1e-9)  # [1/m]
    event, dom = pairs_in_reach(vertex, flight, line_light, strength, doms, config)
    to_dom = pick(doms, dom) - pick(vertex, event)
    along = dot(to_dom, pick(flight, event))
    distance = np.sqrt(np.maximum(dot(to_dom, to_dom) - along ** 2, 0) + 1)  # + 1 m^2: never zero
    emitted = along - distance / np.tan(CONE)  # [m] from the vertex to where the light that gets here is made
    turn = IONISATION / RADIATION  # [GeV] where both losses are equal
    left = (energy[event] + turn) * np.exp(-RADIATION * emitted) - turn  # [GeV] the muon's energy there
    lit = np.flatnonzero((emitted > 0) & (left > 0))  # after the vertex, before the muon has stopped
    event, dom, along, distance, emitted, left = (
        values[lit] for values in (event, dom, along, distance, emitted, left))

    path = distance / np.sin(CONE)
    z_dom, z_emitted = doms[2][dom], vertex[2][event] + emitted * flight[2][event]
    dirt = mean_dirt(z_emitted, z_dom, config.dust)
    photons = PHOTONS_PER_METRE + PHOTONS_PER_GEV * RADIATION * left  # [1/m] as if its losses were smooth
    expected = photons * line_light(distance, dirt, config) * response((z_dom - z_emitted) / path)
    time = (along + distance * np.tan(CONE)) / LIGHT_SPEED  # 0 is the muon at the vertex
    return event, dom, expected, time, path, dirt


# ------------------------------------------------------------------------------------------------------------
# pulses
# ------------------------------------------------------------------------------------------------------------

def draw_photons(event, dom, expected, time, path, dirt, config, rng):
    """Detected photons -> event, dom, time [ns], weight (photons that each of them stands for)."""
    n = rng.poisson(expected / (1 + expected / SATURATION))
    hit = np.flatnonzero(n)
    drawn = np.minimum(n[hit], MAX_PHOTONS)
    pair = np.repeat(hit, drawn)
    # Pandel's law: shape ~ scatterings on the way, and long detours are absorbed
    absorbed = LIGHT_SPEED / REFRACTIVE_INDEX * dirt[pair] * config.absorption / ABSORPTION_LENGTH  # [1/ns]
    scale = 1 / (1 / PANDEL_TIME + absorbed)  # [ns]
    delay = scale * rng.standard_gamma(path[pair] * dirt[pair] * config.scattering / PANDEL_LENGTH)
    return event[pair], dom[pair], time[pair] + delay, np.repeat(n[hit] / drawn, drawn)


def draw_afterpulses(event, dom, time, weight, share, rng):
    """Each photo-electron makes a late one in its DOM, with probability `share` -> event, dom, time [ns]."""
    cause = np.repeat(np.arange(len(time)), rng.poisson(share * weight))
    return event[cause], dom[cause], time[cause] + rng.uniform(*AFTERPULSE_DELAY, len(cause))


def draw_noise(event, time, n_doms, rate, rng):
    """Dark pulses, from well before to well after the photons of each event -> event, dom, time [ns]."""
    first, last = np.full(CHUNK, np.inf), np.full(CHUNK, -np.inf)
    np.minimum.at(first, event, time)
    np.maximum.at(last, event, time)
    span = np.maximum(last - first + READOUT_BEFORE + READOUT_AFTER, 0)  # events without photons: -inf, so 0
    noise = np.repeat(np.arange(CHUNK), rng.poisson(rate * n_doms * span))
    time = first[noise] - READOUT_BEFORE + span[noise] * rng.random(len(noise))
    return noise, rng.integers(n_doms, size=len(noise)), time


def make_pulses(event, dom, time, weight, n_doms, rng):
    """Photons -> pulses: event, dom, time [ns, integer], charge [p.e.]."""
    time = np.floor(time + TIME_JITTER * rng.standard_normal(len(time))).astype(np.int64)
    origin = time.min() // MERGE_TIME * MERGE_TIME
    span = (time.max() - origin) // MERGE_TIME * MERGE_TIME + MERGE_TIME
    key = (event * n_doms + dom) * span + time - origin  # key // MERGE_TIME numbers the bins of all DOMs
    order = np.argsort(key, kind="stable")
    key = key[order]
    first = np.flatnonzero(np.diff(key // MERGE_TIME, prepend=-1))  # of each pulse
    charge = np.abs(rng.normal(CHARGE_MEAN, CHARGE_WIDTH, len(key)))
    is_low = rng.random(len(key)) < LOW_CHARGE_SHARE
    charge[is_low] = rng.exponential(LOW_CHARGE_MEAN, is_low.sum())
    charge = np.add.reduceat(charge * weight[order], first)
    charge = np.round(CHARGE_MIN + CHARGE_STEP * np.floor(charge / CHARGE_STEP), 3)
    channel, time = np.divmod(key[first], span)
    return channel // n_doms, channel % n_doms, time + origin, charge


# ------------------------------------------------------------------------------------------------------------
# local coincidence and trigger
# ------------------------------------------------------------------------------------------------------------

COINCIDENCE_TIME = 1000  # [ns] local coincidence: a hit on a neighbour within 1 us, arXiv:1612.05093
COINCIDENCE_REACH = 2  # the two DOMs above and the two below on the string


@lru_cache(maxsize=1)
def number_along_strings(detector):
    """Numbers of the DOMs by string and depth (V,), with gaps: neighbours in reach differ by 1 or 2."""
    order = np.lexsort((-detector.position[2], detector.string))
    is_next_string = np.diff(detector.string[order], prepend=detector.string[order[0]]) != 0
    rung = np.empty(len(detector), np.int64)
    rung[order] = np.arange(len(detector)) + COINCIDENCE_REACH * np.cumsum(is_next_string)
    return rung


def local_coincidence(event, rung, time):
    """True where a neighbour, one or two DOMs up or down the string, has a pulse of the event within 1 us.

    event (integers), rung (number_along_strings of its DOM), time [ns]: the pulses of many events, in any
    order -> bool for each pulse.
    """
    if len(time) == 0:
        return np.zeros(0, bool)
    window = 1000 * COINCIDENCE_TIME
    time = np.rint(np.asarray(time, np.float64) * 1000).astype(np.int64)  # [ps] integers: keys are exact
    time = time - time.min()
    step = time.max() + window + 1  # from a DOM to the next: keys that are within the window are of one DOM
    event = np.asarray(event, np.int64)
    key = ((event - event.min()) * (rung.max() + 1 + COINCIDENCE_REACH) + rung) * step + time
    order = np.argsort(key)
    key, found = key[order], np.zeros(len(key), bool)
    for offset in range(-COINCIDENCE_REACH, COINCIDENCE_REACH + 1):
        if offset != 0:
            # the first pulse of that neighbour that is not too early counts, if it is not too late either
            earliest = key + offset * step - window
            candidate = key[np.minimum(np.searchsorted(key, earliest), len(key) - 1)]
            found |= (candidate >= earliest) & (candidate <= earliest + 2 * window)
    result = np.empty_like(found)
    result[order] = found
    return result


def trigger(event, dom, time, charge, aux, rng):
    """Keep the readout of the events that trigger -> the same columns, sorted by event and time."""
    origin, span = time.min(), np.ptp(time) + 1
    order = np.argsort((event * span + time - origin) * (dom.max() + 1) + dom)  # dom: no two keys are equal
    event, dom, time, charge, aux = (values[order] for values in (event, dom, time, charge, aux))

    good = np.flatnonzero(~aux)
    first, last = good[:max(len(good) - TRIGGER_PULSES + 1, 0)], good[TRIGGER_PULSES - 1:]
    fired = (event[first] == event[last]) & (time[last] - time[first] <= TRIGGER_TIME)
    first, last = first[fired], last[fired]
    never = np.iinfo(np.int64).max  # for events without a trigger
    start, end = np.full(CHUNK, never), np.zeros(CHUNK, np.int64)
    start[event[first][::-1]] = time[first][::-1]  # the last value of an event stays: the earliest
    end[event[last]] = time[last]
    keep = (time >= start[event] - READOUT_BEFORE) & (time <= end[event] + READOUT_AFTER)
    keep &= (np.bincount(event[keep], minlength=CHUNK) <= MAX_PULSES)[event]
    shift = TRIGGER_AT - start + rng.integers(-TRIGGER_SHAKE, TRIGGER_SHAKE + 1, CHUNK)
    return event[keep], dom[keep], (time + shift[event])[keep], charge[keep], aux[keep]


def simulate_chunk(detector, config, rng):
    """CHUNK interactions -> pulse columns of those that triggered, numbered from 0; their truth. Or None."""
    events, doms = draw_events(CHUNK, volume_of(detector), config.energy_min, rng), detector.position
    vertex, flight = events["vertex"], events["flight"]
    sources = (cascade_light(vertex, flight, events["cascade_energy"], doms, config),
               track_light(vertex, flight, events["muon_energy"], doms, config))
    event, dom, expected, *rest = map(np.concatenate, zip(*sources))
    expected = expected * config.efficiency * efficiency_of(detector)[dom]
    event, dom, time, weight = draw_photons(event, dom, expected, *rest, config, rng)
    bright = (np.bincount(event, minlength=CHUNK) >= TRIGGER_PULSES)[event]  # the others can hardly trigger
    if not bright.any():  # only in a geometry much thinner than IceCube's, or with blind tubes
        return None
    event, dom, time, weight = event[bright], dom[bright], time[bright], weight[bright]
    late = draw_afterpulses(event, dom, time, weight, config.afterpulses, rng)
    event, dom, time = (np.concatenate(pair) for pair in zip((event, dom, time), late))
    noise = draw_noise(event, time, len(detector), config.noise * NOISE_RATE, rng)
    event, dom, time = (np.concatenate(pair) for pair in zip((event, dom, time), noise))
    weight = np.append(weight, np.ones(len(time) - len(weight)))
    event, dom, time, charge = make_pulses(event, dom, time, weight, len(detector), rng)
    aux = ~local_coincidence(event, number_along_strings(detector)[dom], time)
    event, *columns = trigger(event, dom, time, charge, aux, rng)
    triggered, event = np.unique(event, return_inverse=True)
    return (event, *columns), {name: values[..., triggered] for name, values in events.items()}


def simulate_events(n, detector, config, rng, max_dark=300):
    """Exactly n triggered events -> pulse columns event (0..n-1), dom, time, charge, aux; their truth.

    A detector that sees nothing in more than max_dark chunks is refused.
    """
    chunks, n_found, n_dark = [], 0, 0
    while n_found < n:
        chunk = simulate_chunk(detector, config, rng)
        n_dark = 0 if chunk and len(chunk[1]["energy"]) else n_dark + 1
        if n_dark > max_dark:
            fail(f"none of the last {n_dark * CHUNK:,} neutrinos triggered the detector: that takes "
                 f"{TRIGGER_PULSES} pulses of neighbours on a string; DOMs of equal x and y, or of one "
                 "number in a column string of the geometry, stand on one; mend it, and begin in another "
                 "--out_dir")
        if chunk:
            (event, *columns), truth = chunk
            chunks.append(((event + n_found, *columns), truth))
            n_found += len(truth["energy"])
    pulses, truths = zip(*chunks)
    pulses = [np.concatenate(column) for column in zip(*pulses)]
    end = np.searchsorted(pulses[0], n)  # what the last chunk has too many
    truth = {name: np.concatenate([part[name] for part in truths], axis=-1)[..., :n] for name in truths[0]}
    return [column[:end] for column in pulses], truth


# ------------------------------------------------------------------------------------------------------------
# files
# ------------------------------------------------------------------------------------------------------------

PULSE_COLUMNS = {"sensor_id": "int16", "time": "int64", "charge": "float64", "auxiliary": "bool",
                 "event_id": "int64"}
PANDAS = {"index_columns": ["event_id"],  # as in Kaggle's files
          "column_indexes": [], "pandas_version": "2.0.0",
          "columns": [{"name": name, "field_name": name, "pandas_type": kind, "numpy_type": kind,
                       "metadata": None}
                      for name, kind in PULSE_COLUMNS.items()]}
PULSE_SCHEMA = pa.schema(list(zip(PULSE_COLUMNS, map(pa.type_for_alias, PULSE_COLUMNS.values()))),
                         metadata={"pandas": json.dumps(PANDAS)})
TEST_META_SCHEMA = pa.schema([
    ("batch_id", pa.int64()), ("event_id", pa.int64()),
    ("first_pulse_index", pa.int64()), ("last_pulse_index", pa.int64())])  # rows of the batch; last included
META_SCHEMA = pa.schema([
    *TEST_META_SCHEMA,
    ("azimuth", pa.float64()), ("zenith", pa.float64()),  # [rad] to the source
    ("energy", pa.float64()), ("event_class", pa.uint8())])  # not in Kaggle's: [GeV]; 1 track, 2 cascade


def describe_geometry(detector):
    """What a record tells of the DOMs, on which the bytes depend."""
    doms = np.column_stack([*detector.position, detector.string]).astype("<f8")
    return f"DOMs with crc32 {zlib.crc32(doms.tobytes()):08x}"


def write_detector(out_dir, detector):
    columns = [*detector.position.tolist(), detector.string.tolist()]
    lines = [",".join(map(str, row)) for row in zip(range(len(detector)), *columns)]
    text = "\n".join(["sensor_id,x,y,z,string", *lines, ""])
    write_atomic(out_dir / "sensor_geometry.csv", lambda part: part.write_text(text))


def batch_paths(out_dir, split, batch):
    return out_dir / split / f"batch_{batch}.parquet", out_dir / ".parts" / f"meta_{batch}.parquet"


def simulate_batch(out_dir, split, batch, first_event, n_events, config, detector):
    """Write a batch file and its rows of the meta table. Runs in a worker process."""
    rng = np.random.default_rng(np.random.SeedSequence([config.seed, batch]))
    meta = []

    def write_pulses(path):
        n_done = n_pulses = 0
        dictionaries = ["sensor_id", "charge", "event_id"]  # the columns of few different values
        with pq.ParquetWriter(path, PULSE_SCHEMA, use_dictionary=dictionaries) as writer:
            while n_done < n_events:
                n = min(EVENTS_PER_GROUP, n_events - n_done)
                (event, dom, time, charge, aux), truth = simulate_events(n, detector, config, rng)
                number = first_event + n_done + np.arange(n)
                event_id = number * EVENT_ID_STEP + rng.integers(EVENT_ID_STEP, size=n)
                columns = [dom.astype(np.int16), time, charge, aux, event_id[event]]
                writer.write_table(pa.table(columns, PULSE_SCHEMA))
                end = n_pulses + np.cumsum(np.bincount(event, minlength=n))
                columns = [np.full(n, batch), event_id, np.append(n_pulses, end[:-1]), end - 1]
                meta.append(pa.table(columns + [truth[name] for name in META_SCHEMA.names[4:]], META_SCHEMA))
                n_done, n_pulses = n_done + n, end[-1]
                count_events(n)

    pulse_path, meta_path = batch_paths(out_dir, split, batch)
    write_atomic(pulse_path, write_pulses)
    write_atomic(meta_path, lambda path: pq.write_table(pa.concat_tables(meta), path))  # last: batch done


def join_meta(path, schema, parts):
    """Write one meta table from those of the batches -> number of pulses of each event."""
    lengths = []

    def write(part):
        with pq.ParquetWriter(part, schema) as writer:
            for table in map(pq.read_table, parts):
                writer.write_table(table.select(schema.names))
                first, last = (table[f"{end}_pulse_index"].to_numpy() for end in ("first", "last"))
                lengths.append(last - first + 1)

    write_atomic(path, write)
    return np.concatenate(lengths)


# ------------------------------------------------------------------------------------------------------------
# main
# ------------------------------------------------------------------------------------------------------------

def main():
    config = load_config(SimulateConfig, __doc__)
    out_dir = Path(config.out_dir)
    detector = choose_detector(config.geometry)
    tasks = []  # the test batches go on counting where train ends, as Kaggle's do
    for split, first, n in (("train", 0, config.n_events), ("test", config.n_events, config.n_test_events)):
        for start in range(0, n, config.events_per_batch):
            n_batch = min(config.events_per_batch, n - start)
            tasks.append((out_dir, split, len(tasks) + 1, first + start, n_batch, config, detector))
    splits = {"train": META_SCHEMA} | ({"test": TEST_META_SCHEMA} if config.n_test_events else {})
    outputs = [out_dir / "sensor_geometry.csv"] + [out_dir / f"{split}_meta.parquet" for split in splits]

    # all that the bytes depend on: knobs, geometry, and the constants above, which a reader may change
    settings = {key: value for key, value in asdict(config).items()
                if key not in ("out_dir", "workers", "geometry")}
    settings["geometry"] = describe_geometry(detector)
    settings |= {key: value for key, value in globals().items() if key.isupper()
                 and type(value) in (int, float, tuple)}
    settings = json.loads(json.dumps(settings))  # as they will be read back
    record = out_dir / "simulate.json"
    if os.path.exists(record):
        # a record without these keys is older than they are; its events are as the defaults make them
        younger = asdict(SimulateConfig()) | {"AFTERPULSE_DELAY": settings["AFTERPULSE_DELAY"]}
        found = younger | read_json(record)
        check_settings(out_dir, found, settings, "out_dir")
        if found.get("complete") and all(map(os.path.exists,
                                             outputs + [batch_paths(*task[:3])[0] for task in tasks])):
            print(f"{out_dir} is complete, nothing to do")
            return
    elif any(os.path.exists(path) for path in (*outputs, out_dir / "train", out_dir / "test")):
        fail(f"{out_dir} holds data that simulate.py did not write; choose another --out_dir")

    lock = hold_lock(out_dir / ".parts")  # held until main() ends
    print_knobs(config)
    write_json(record, {"complete": False} | settings)
    write_detector(out_dir, detector)
    todo = [task for task in tasks if not all(map(os.path.exists, batch_paths(*task[:3])))]
    n_all, n_todo = (sum(task[4] for task in some) for some in (tasks, todo))
    with progress_bar(n_all, "simulate", "event", initial=n_all - n_todo) as bar:
        run_in_workers(simulate_batch, todo, max(1, min(config.workers or count_cores(), len(todo))), bar,
                       lambda *_: None)
    for split, schema in splits.items():
        parts = [batch_paths(*task[:3])[1] for task in tasks if task[1] == split]
        lengths = join_meta(out_dir / f"{split}_meta.parquet", schema, parts)
        print(f"{out_dir / split}: {len(parts)} files, {len(lengths):,} events, {lengths.sum():,} pulses, "
              f"median {np.median(lengths):.0f} an event")
    write_json(record, {"complete": True} | settings)
    shutil.rmtree(out_dir / ".parts", ignore_errors=True)  # network disks keep a lock that is open


if __name__ == "__main__":
    run_stage(main)
