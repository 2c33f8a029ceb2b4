"""The .bin format, which events make up step k, masks, packed batches.

    data/<name>/meta.json           version, seed, rule (pulses that stay), splits
                geometry.bin        GEOMETRY records, row = sensor_id
                <split>_pulses.bin  PULSE records of all events, one event after another
                <split>_events.bin  EVENT records
"""
import json
import zlib
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np

from utils import RANK, WORLD_SIZE, fail, print0

MAX_DOMS = 65_535  # ids are uint16, and one number is left for MASK
GROUP_SIZE = 8  # neighbours stay together: 6 kB of disk

GEOMETRY = np.dtype([
    ("position", "<f4", (3,)),  # [m] from the middle of the detector
    ("string", "<u2"),  # counted from 0; IceCube: sensor_id // 60
])  # 14 bytes, packed, as are the others

PULSE = np.dtype([
    # DIFF(upstream): float16 is off by up to 29 ns, and merges 5160 ids into 3338
    ("time", "<f4"),  # [ns], trigger near 10,000
    ("charge", "<f4"),  # [p.e.]
    ("dom", "<u2"),  # sensor_id
    ("aux", "?"),  # False = HLC, in local coincidence
])  # 11 bytes

EVENT = np.dtype([
    ("event_id", "<i8"),
    ("start", "<i8"),  # first pulse in <split>_pulses.bin
    ("length", "<u2"),  # pulses on disk, 1..max_pulses
    ("n_pulses", "<u4"),  # of the full event, as are the three sums below
    ("total_charge", "<f4"),  # [p.e.]
    ("center", "<f4", (3,)),  # [m] charge-weighted
    ("line_fit", "<f4", (3,)),  # to the source, a guess; 0 if no fit is possible
    ("azimuth", "<f4"),  # [rad] towards the source; NaN unknown
    ("zenith", "<f4"),  # [rad]
    ("energy", "<f4"),  # [GeV]; NaN unknown
    ("event_class", "u1"),  # 0 unknown, 1 track, 2 cascade
])  # 63 bytes

# of meta.json; raise the number if what a field means changes
FORMAT = {"format": 3, "dtypes": [str(dtype.descr) for dtype in (GEOMETRY, PULSE, EVENT)]}

# ---- reading a data folder ----------------------------------------------------------------------

class Split(NamedTuple):
    """One split of a data folder, mapped into memory."""
    path: str  # data folder and name of the split, for messages
    events: np.ndarray  # (n_events,) EVENT
    pulses: np.ndarray  # (n_pulses,) PULSE
    geometry: np.ndarray  # (V,) GEOMETRY

def fingerprint(meta):
    meta = {**meta, "input_dir": "", "fingerprint": ""}  # that folder may move
    return zlib.crc32(json.dumps(meta, sort_keys=True).encode())

def read_folder(data_dir):
    """Read a finished data folder's meta.json -> dict, GEOMETRY records (V,)."""
    path = Path(data_dir) / "meta.json"
    if not path.is_file():
        fail(f"{path}: no such file; prepare.py writes it last: run it again")
    try:
        meta = json.loads(path.read_bytes())
    except ValueError:
        meta = {}
    if meta.get("fingerprint") != fingerprint(meta) or not FORMAT.items() <= meta.items():
        fail(f"{path}: damaged, or of another version; prepare into another data_dir")
    geometry = np.fromfile(path.parent / "geometry.bin", GEOMETRY)
    if zlib.crc32(geometry.tobytes()) != meta["geometry_crc"]:
        fail(f"{path.parent}/geometry.bin: it has changed; prepare into another data_dir")
    return meta, geometry

def open_split(data_dir, name, n_events=0):
    """Map the first n_events of a split (0 = all) into memory -> Split."""
    meta, geometry = read_folder(data_dir)
    if name not in meta["splits"]:
        fail(f"{data_dir}: no split {name!r}; it has {', '.join(meta['splits'])}")
    arrays = []
    for kind, dtype in (("events", EVENT), ("pulses", PULSE)):
        path, n = Path(data_dir) / f"{name}_{kind}.bin", meta["splits"][name][f"n_{kind}"]
        if path.stat().st_size != n * dtype.itemsize:
            fail(f"{path}: it has changed; prepare into another data_dir")
        arrays.append(np.asarray(np.memmap(path, dtype, "r")))  # slices faster
    split = Split(f"{data_dir}/{name}", *arrays, geometry)
    index = np.unique(np.linspace(0, len(split.events) - 1, 1000).astype(int))
    events, pulses = read_events(split, index)
    begin = np.cumsum(events["length"], dtype=int) - events["length"]
    end = np.append(split.events["start"][index[:-1] + 1], len(split.pulses))
    is_later = np.diff(pulses["time"], prepend=0) >= 0  # NaN is not
    is_later[begin] = pulses["time"][begin] >= 0
    has_charge = np.add.reduceat(pulses["charge"], begin) > 0
    is_whole = np.append(has_charge, events["start"] + events["length"] == end)
    if not is_later.all() or not is_whole.all():
        fail(f"{split.path}_*.bin: damaged; prepare into another data_dir")
    if n_events > len(split.events):
        print0(f"note: {split.path} has only {len(split.events):,} events")
    return split._replace(events=split.events[:n_events or None])

def read_geometry_csv(path, origin="0,0,0"):
    """Read sensor_geometry.csv -> position (V, 3) [m], string (V,)."""
    import pyarrow.csv
    try:
        table = pyarrow.csv.read_csv(path).to_pydict()
        order = np.argsort(table["sensor_id"])
        position = np.array([table[axis] for axis in "xyz"], np.float64).T[order]
        position -= np.array(origin.split(","), float).reshape(3)
        string = position[:, :2] if len(order) != 5160 else np.arange(5160) // 60  # IceCube
        string = np.array(table["string"])[order] if "string" in table else string
        string = np.unique(string, axis=0, return_inverse=True)[1].ravel()
    except (ValueError, TypeError, KeyError) as error:
        fail(f"{path}: needs numbers in sensor_id, x, y, z [m], no gaps ({str(error)[:80]!r})")
    is_counted = np.array_equal(np.sort(table["sensor_id"]), np.arange(len(order)))
    if not is_counted or len(order) > MAX_DOMS or not np.isfinite(position).all():
        fail(f"{path}: needs sensor_id 0, 1, 2, ... up to {MAX_DOMS - 1}, finite positions")
    return position, string

# ---- which events make up a step ----------------------------------------------------------------

def step_events(step, batch_size, n_events, seed):
    """Return the events of a step, by number and seed -> index, epoch (B,)."""
    place = step * batch_size + np.arange(batch_size)
    epoch, in_epoch = np.divmod(place, n_events)
    index = np.empty(batch_size, np.int64)
    for e in range(epoch[0], epoch[-1] + 1):
        groups, shift = epoch_order(n_events, seed, e)
        group, within = np.divmod(in_epoch[epoch == e], GROUP_SIZE)
        place = groups[group].astype(np.int64) * GROUP_SIZE + within
        index[epoch == e] = (place + shift) % n_events
    return index, epoch

@lru_cache(maxsize=2)  # this epoch and the last: 65 MB for 130 M events
def epoch_order(n_events, seed, epoch):
    """Return the order of the groups, and a shift of where they begin."""
    rng = np.random.default_rng([seed, epoch])
    shift = int(rng.integers(n_events))
    groups = rng.permutation(n_events // GROUP_SIZE)
    return np.append(groups, n_events // GROUP_SIZE).astype(np.uint32), shift  # rest last

def shard(n):
    """Return which of n things this rank works on: neighbours."""
    return np.array_split(np.arange(n), WORLD_SIZE)[RANK]

def read_events(split, index):
    """Read events by index -> EVENT records (B,), their PULSE records (P,)."""
    # slow form: np.concatenate([pulses[e["start"]:e["start"] + e["length"]] for e in events])
    events = split.events.view(f"V{EVENT.itemsize}").take(index).view(EVENT)  # fast
    first = np.flatnonzero(np.diff(index, prepend=index[0] - 2) != 1)  # a run begins
    last = np.append(first[1:], len(index)) - 1
    begin = events["start"][first] * PULSE.itemsize
    end = (events["start"][last] + events["length"][last]) * PULSE.itemsize
    raw = memoryview(split.pulses.view(np.uint8))
    pieces = [raw[a:b] for a, b in zip(begin.tolist(), end.tolist())]
    pulses = np.frombuffer(b"".join(pieces), PULSE)
    is_whole = events["length"].min() > 0 and len(pulses) == events["length"].sum()
    if not is_whole or pulses["dom"].max() >= len(split.geometry):
        fail(f"{split.path}_*.bin: damaged; prepare into another data_dir")
    return events, pulses

# ---- masks --------------------------------------------------------------------------------------

GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # 2^64 over the golden ratio

def uniform_hash(seed, key, place, counts=1):
    """Return numbers in [0, 1) that depend on (seed, key, place) alone.

    key and place are integer arrays; key i belongs to the next counts[i] places. A hash
    (splitmix64, Steele et al. 2014): the same in any batch, on any rank.
    """
    with np.errstate(over="ignore"):  # modulo 2^64
        key = mix_bits(key.astype(np.uint64) * GOLDEN + mix_bits(np.uint64(seed) + GOLDEN))
        bits = mix_bits(np.repeat(key, counts) + place.astype(np.uint64) * GOLDEN)
    return (bits >> np.uint64(11)).view(np.int64) * 2.0 ** -53  # int64: 8 times faster

def mix_bits(z):  # in place if z is an array: a third of the time
    for shift, factor in (30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB):
        z ^= z >> np.uint64(shift)
        z *= np.uint64(factor)
    z ^= z >> np.uint64(31)
    return z

def draw_mask(events, pulses, string, epoch, mask_prob, mask_unit, seed):
    """Draw the pulses to mask -> bool (P,): each HLC pulse with probability mask_prob.

    mask_unit: masked together are single pulses, or those of a DOM or a string
    (V,); "a+b": each event takes one of them. At least one if there are any. A
    hash of seed, epoch (B,), event and unit decides.
    # DIFF(upstream): an event may have nothing masked, and validation masks are new every time
    """
    length = events["length"].astype(np.int64)
    offset = np.cumsum(length) - length
    start, dom = np.repeat(events["start"], length), pulses["dom"]
    places = {"pulse": start + np.arange(len(dom)) - np.repeat(offset, length),
              "dom": start * 2**16 + dom, "string": start * 2**16 + string[dom]}
    places = [places[unit] for unit in mask_unit.split("+")]
    choice = uniform_hash(seed, epoch, ~events["start"]) * len(places)
    place = np.choose(np.repeat(choice.astype(int), length), places)
    number = uniform_hash(seed, epoch, place, length)
    number[pulses["aux"]] = 2.0  # never
    limit = np.maximum(np.minimum.reduceat(number, offset), mask_prob)
    return (number <= np.repeat(limit, length)) & ~pulses["aux"]

# ---- packed micro-batches -----------------------------------------------------------------------

def micro_batches(events, pulses, size, labels=(), mask=None):
    """Sort events by length, pack micro-batches of `size` -> list of dicts.

    A dict is a batch as in model.py, with the fields of EVENT in `labels`; row (B,),
    the event's place; with a mask (bool per pulse) n_masked_events.
    # DIFF(upstream): every event is padded to 127 pulses
    """
    import torch  # prepare.py needs no torch
    length = events["length"].astype(np.int64)
    offset = np.cumsum(length) - length
    columns = {name: np.ascontiguousarray(pulses[name]) for name in PULSE.names}
    columns |= {} if mask is None else {"masked": mask}
    batches = []
    for rows in np.array_split(np.argsort(length, kind="stable"), -(-len(events) // size)):
        n_tokens = length[rows] + 1
        cu_seqlens = np.append(0, np.cumsum(n_tokens))
        cls = cu_seqlens[:-1]
        # the pulse of each token (T,); meaningless for [CLS]
        pulse = np.arange(cu_seqlens[-1]) + np.repeat(offset[rows] - cls - 1, n_tokens)
        batch = {name: column.take(pulse, mode="clip") for name, column in columns.items()}
        for column in batch.values():
            column[cls] = 0
        batch["dom"] = batch["dom"].astype(np.int64)
        batch |= {name: np.ascontiguousarray(events[name][rows]) for name in labels}
        extra = {"max_seqlen": int(n_tokens.max()), "row": rows}
        batch["cu_seqlens"] = cu_seqlens.astype(np.int32)
        if mask is not None:
            batch["masked"] = np.flatnonzero(batch["masked"])
            batch["masked_event"] = np.repeat(np.arange(len(rows)), n_tokens)[batch["masked"]]
            extra["n_masked_events"] = len(np.unique(batch["masked_event"]))
        batches.append({name: torch.from_numpy(x) for name, x in batch.items()} | extra)
    return batches

def fitting_micro_batch_size(config, device, meta):
    """Return how many events fit into a GPU's memory, or into a CPU's cache."""
    import torch
    if device.type != "cuda":
        return min(max(8192 // config.embedding_dim, 16), 128)
    n_bytes = 150 if config.backbone == "mamba" else 50  # per number
    n_bytes *= config.num_layers * config.embedding_dim * (meta["rule"]["max_pulses"] + 1)
    return int(min(max(0.6 * torch.cuda.mem_get_info(device)[1] / n_bytes, 1), 4096))

def prefetch(load, steps, device, depth=2):
    """Yield load(step), a list of batches, on the device. A thread reads ahead."""
    import torch
    is_cuda = device.type == "cuda"
    def load_pinned(step):
        if is_cuda:
            torch.cuda.set_device(device)  # of this thread; pinning would start on GPU 0
        return [{name: x.pin_memory() if is_cuda and torch.is_tensor(x) else x
                 for name, x in batch.items()} for batch in load(step)]
    steps = iter(steps)
    with ThreadPoolExecutor(1) as pool:
        queue = [pool.submit(load_pinned, step) for step in islice(steps, depth)]
        while queue:
            queue.extend(pool.submit(load_pinned, step) for step in islice(steps, 1))
            yield [{name: x.to(device, non_blocking=True) if torch.is_tensor(x) else x
                    for name, x in batch.items()} for batch in queue.pop(0).result()]
