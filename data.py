"""The .bin format on disk, which events make up training step k, and the batches they are packed into.

    data/<name>/meta.json           format version, source, seed, max_pulses, n_doms, splits; written last
                geometry.bin        GEOMETRY records, row = sensor_id
                <split>_pulses.bin  PULSE records of all events, one event after another, no padding
                <split>_events.bin  EVENT records

Without padding a data set is half as large, and neighbouring events are read in one piece. Which events make
up step k follows from k, the batch size, the number of events and the seed. So a run that was resumed, or
that has another number of ranks, sees the same events.
"""
import json
import zlib
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

from common import fail, read_json

FORMAT_VERSION = 2

GEOMETRY = np.dtype([
    ("position", "<f4", (3,)),  # [m] from the middle of the detector
    ("string", "<u2"),  # counted from 0; IceCube: sensor_id // 60
])  # 14 bytes, packed; one record per DOM, n_doms in all: 5160 in IceCube, 65,535 at most

PULSE = np.dtype([
    # [ns] in the readout window, trigger near 10,000  # DIFF(upstream): float16, off by up to 29 ns
    ("time", "<f4"),
    ("charge", "<f4"),  # [p.e.]
    # sensor_id, 0..n_doms - 1; an integer all the way  # DIFF(upstream): float16 ids merge 5160 into 3338
    ("dom", "<u2"),
    ("aux", "?"),  # True = not in local coincidence
])  # 11 bytes, packed

EVENT = np.dtype([
    ("event_id", "<i8"),
    ("start", "<i8"),  # index of the first pulse in <split>_pulses.bin
    ("length", "<u2"),  # pulses on disk, 1..max_pulses
    ("n_pulses", "<u4"),  # pulses of the full event, before it was cut to max_pulses
    ("total_charge", "<f4"),  # [p.e.] of the full event
    ("center", "<f4", (3,)),  # [m] charge-weighted centre of the full event
    # unit vector opposite to the motion of the light, so it points back to the source: a first guess, from a
    # line fit to the full event, without labels. Zeros where no fit is possible
    ("motion", "<f4", (3,)),
    ("azimuth", "<f4"),  # [rad] of the direction the neutrino came from; NaN where unknown
    ("zenith", "<f4"),  # [rad]
    ("energy", "<f4"),  # [GeV]; NaN where unknown
    ("event_class", "u1"),  # 0 unknown, 1 track, 2 cascade
])  # 63 bytes, packed

# what prepare.py keeps in a data folder until it is done: its settings, the finished batches
UNFINISHED = "unfinished"

# events that lie together on disk and stay together in the shuffle: 5.8 kB, two or three pages of the disk
GROUP_SIZE = 8


# ------------------------------------------------------------------------------------------------------------
# reading a data folder
# ------------------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Split:
    """One split of a data folder, memory-mapped: events (n_events,) of EVENT, pulses (n_pulses,) of PULSE."""
    path: str  # data folder and split name, for messages
    events: np.ndarray
    pulses: np.ndarray
    n_doms: int  # of the detector

    def __len__(self):
        return len(self.events)


def read_meta(data_dir):
    """The meta.json of a finished data folder, checked for its version and dtypes."""
    folder = Path(data_dir)
    path, settings = folder / "meta.json", folder / UNFINISHED / "settings.json"
    if not folder.is_dir():
        fail(f"{folder.absolute()}: no such data folder; make it with: {command_to_prepare(data_dir)}")
    if not path.is_file() and settings.is_file():
        fail(f"{path} is missing: preparing this folder never finished; to go on, run: "
             f"{read_json(settings)['command']}")
    if not path.is_file():
        fail(f"{path} is missing: this is no folder that prepare.py made; check data_dir")
    try:
        meta = json.loads(path.read_text())
    except ValueError:
        refuse_folder(data_dir, path, "not valid JSON")
    found = meta.get("format") if isinstance(meta, dict) and "splits" in meta else None
    if found != FORMAT_VERSION:
        refuse_folder(data_dir, path, f"format {found}, need {FORMAT_VERSION}")
    if meta.get("dtypes") != describe_dtypes():
        refuse_folder(data_dir, path, "the records are laid out differently from data.py")
    return meta


def refuse_folder(data_dir, path, why):
    fail(f"{path}: {why}; remove the folder (rm -r '{data_dir}') and run prepare.py again")


def check_size(data_dir, path, n_bytes):
    size = path.stat().st_size if path.is_file() else 0
    if size != n_bytes:
        refuse_folder(data_dir, path, f"{size} bytes, meta.json says {n_bytes}: it was cut or replaced")


def describe_dtypes():
    """The record layouts in the form that meta.json holds: lists of [name, type] and [name, type, shape]."""
    return json.loads(json.dumps({"geometry": GEOMETRY.descr, "pulse": PULSE.descr, "event": EVENT.descr}))


def command_to_prepare(data_dir):
    """The command that makes this data folder, if one of the sample configs does; else one with blanks."""
    samples = Path(__file__).parent / "sample_config"
    for path in sorted(samples.rglob("*prepare*.py")):
        if f'data_dir = "{data_dir}"' in path.read_text():
            return f"python prepare.py {path.relative_to(samples.parent)}"
    return f"python prepare.py --input_dir=... --data_dir={data_dir} --splits=..."


def fingerprint(data_dir):
    """Checksum of meta.json without input_dir: it changes with the events, and with max_pulses."""
    meta = read_meta(data_dir)
    meta.pop("input_dir", None)  # that folder may be moved
    return f"{zlib.crc32(json.dumps(meta, sort_keys=True).encode()):08x}"


def open_split(data_dir, name):
    """Memory-map one split. Exits with one line if it does not exist, is empty or a file has a wrong size."""
    meta = read_meta(data_dir)
    splits = meta["splits"]
    if name not in splits:
        fail(f"{data_dir} has no split {name!r}, it has: {', '.join(splits)}")
    count = splits[name]
    if count["n_events"] == 0:
        fail(f"{data_dir}: split {name!r} holds no events")
    files = []
    for kind, dtype in (("events", EVENT), ("pulses", PULSE)):
        path = Path(data_dir) / f"{name}_{kind}.bin"
        check_size(data_dir, path, count[f"n_{kind}"] * dtype.itemsize)
        files.append(np.asarray(np.memmap(path, dtype, mode="r")))  # a plain view: memmap slices slowly
    first, last = files[0][0], files[0][-1]
    if first["start"] != 0 or last["start"] + last["length"] != count["n_pulses"]:
        refuse_folder(data_dir, f"{data_dir}/{name}_events.bin",
                      f"its first or last event does not fit {name}_pulses.bin")
    return Split(f"{data_dir}/{name}", *files, meta["n_doms"])


def open_first_events(data_dir, name, n_events, at_most=False):
    """open_split, and how many of its events to use: the first n_events, 0 = all. -> Split, int

    If there are fewer, at_most takes them all. Else that is an error: labels must not get fewer silently.
    """
    split = open_split(data_dir, name)
    if n_events > len(split) and not at_most:
        fail(f"{split.path} holds {len(split):,} events, the config asks for train_events = {n_events:,}; "
             "lower it, 0 = all")
    return split, min(n_events, len(split)) or len(split)


def read_geometry(data_dir):
    """The detector's GEOMETRY records (V,), row = sensor_id."""
    path = Path(data_dir) / "geometry.bin"
    check_size(data_dir, path, read_meta(data_dir)["n_doms"] * GEOMETRY.itemsize)
    return np.fromfile(path, GEOMETRY)


# ------------------------------------------------------------------------------------------------------------
# which events make up a step
# ------------------------------------------------------------------------------------------------------------

def step_events(step, batch_size, n_events, seed):
    """The events of training step `step` -> index (batch_size,) and epoch (batch_size,), both int64.

    Step k takes positions [k * batch_size, (k + 1) * batch_size) of an endless sequence of epochs, so it may
    begin in one epoch and end in the next. An epoch holds every event once, in shuffled groups of GROUP_SIZE
    neighbours.
    """
    position = step * batch_size + np.arange(batch_size)
    epoch, in_epoch = np.divmod(position, n_events)
    index = np.empty(batch_size, np.int64)
    for e in range(epoch[0], epoch[-1] + 1):
        groups, shift = epoch_order(n_events, seed, e)
        group, within = np.divmod(in_epoch[epoch == e], GROUP_SIZE)
        index[epoch == e] = (groups[group].astype(np.int64) * GROUP_SIZE + within + shift) % n_events
    return index, epoch


@lru_cache(maxsize=2)  # the present epoch and the one before: 130 M events are 65 MB an epoch
def epoch_order(n_events, seed, epoch):
    """One epoch's order of the groups. The shift moves the borders between them: neighbours change too."""
    rng = np.random.default_rng([seed, epoch])
    shift = int(rng.integers(n_events))
    groups = rng.permutation(n_events // GROUP_SIZE)
    return np.append(groups, n_events // GROUP_SIZE).astype(np.uint32), shift  # a smaller group comes last


def read_events(split, index):
    """Read events by index -> their records (B,); their pulses, one event after another (sum of lengths,).

    Any order and repeats are allowed; the pulses are read-only. All is copied as plain bytes: numpy copies
    packed records field by field, 10 times slower. Neighbours are copied in one piece: groups of 8 are
    four times as fast as single events.
    """
    events = split.events.view(f"V{EVENT.itemsize}").take(index).view(EVENT)
    first = np.flatnonzero(np.diff(index, prepend=index[0] - 2) != 1)  # where a stretch of neighbours begins
    last = np.append(first[1:], len(index)) - 1
    begin = events["start"][first] * PULSE.itemsize
    end = (events["start"][last] + events["length"][last]) * PULSE.itemsize
    raw = memoryview(split.pulses.view(np.uint8))
    pulses = np.frombuffer(b"".join([raw[a:b] for a, b in zip(begin.tolist(), end.tolist())]), PULSE)
    if pulses["dom"].max() >= split.n_doms:
        path = Path(f"{split.path}_pulses.bin")
        refuse_folder(path.parent, path, f"it has DOM {pulses['dom'].max()}, the detector has {split.n_doms}")
    return events, pulses


def pulse_places(events):
    """Where the pulses of read_events lie in <split>_pulses.bin, int64 (sum of lengths,)."""
    length = events["length"].astype(np.int64)
    offset = np.cumsum(length) - length
    return np.arange(length.sum()) + np.repeat(events["start"] - offset, length)


def uniform_hash(seed, key, place):
    """Uniform numbers in [0, 1) that depend on (seed, key, place) alone, float64.

    key and place are integer arrays of one shape (or broadcast). This is a hash, splitmix64 (Steele, Lea &
    Flood 2014), not a generator: a pulse's number is the same whichever rank, worker or batch asks for it.
    """
    with np.errstate(over="ignore"):  # arithmetic modulo 2^64 is meant
        return to_unit(mix_bits(hash_key(seed, key) + np.asarray(place).astype(np.uint64) * GOLDEN))


def uniform_ranges(seed, key, counts):
    """uniform_hash(seed, key[i], 0 .. counts[i] - 1) for each i, one after another, in half the time."""
    offset = np.cumsum(counts) - counts
    with np.errstate(over="ignore"):
        bits = np.arange(np.sum(counts), dtype=np.uint64) * GOLDEN
        bits += np.repeat(hash_key(seed, key) - offset.astype(np.uint64) * GOLDEN, counts)
    return to_unit(mix_bits(bits))


GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # 2^64 over the golden ratio


def hash_key(seed, key):
    return mix_bits(np.asarray(key).astype(np.uint64) * GOLDEN + mix_bits(np.uint64(seed) + GOLDEN))


def mix_bits(z):  # in place if z is an array: a third of the time
    z ^= z >> np.uint64(30)
    z *= np.uint64(0xBF58476D1CE4E5B9)
    z ^= z >> np.uint64(27)
    z *= np.uint64(0x94D049BB133111EB)
    z ^= z >> np.uint64(31)
    return z


def to_unit(bits):  # 53 bits of 64; via int64, whose conversion to float takes an eighth of the time
    return (bits >> np.uint64(11)).view(np.int64) * 2.0 ** -53


# ------------------------------------------------------------------------------------------------------------
# packed micro-batches
# ------------------------------------------------------------------------------------------------------------

def micro_batches(events, pulses, size, labels=(), hidden=None):
    """Sort events by length, cut them into micro-batches of at most `size` and pack each -> list of dicts.

    Sorted: events of a micro-batch are of about equal length, which helps mixers that lay them out in a
    rectangle. Each dict is a batch as model.py describes it, of tensors that are 0 at [CLS]; it has those
    fields of EVENT that `labels` names, and which pulses are hidden if `hidden` (a bool per pulse) is given.
    Beside these, for others than the model,
      row and event_id (B,), numpy arrays on the CPU: the event's place in `events`, and its id;
      n_scored and n_hidden, ints, with `hidden`: how many events have a hidden pulse, how many are hidden.
    # DIFF(upstream): every event is padded to 127 pulses there
    """
    import torch  # here, not above: prepare.py and its worker processes need no torch
    length = events["length"].astype(np.int64)
    offset = np.cumsum(length) - length
    columns = {name: np.ascontiguousarray(pulses[name]) for name in PULSE.names}
    batches = []
    for rows in np.array_split(np.argsort(length, kind="stable"), -(-len(events) // size)):
        starts = np.append(0, np.cumsum(length[rows] + 1))
        first, n_tokens = starts[:-1], length[rows] + 1
        # the pulse of each token, (T,); that of a [CLS] has no meaning
        place = np.arange(starts[-1]) + np.repeat(offset[rows] - first - 1, n_tokens)
        batch = {name: column.take(place, mode="clip") for name, column in columns.items()}
        for column in batch.values():
            column[first] = 0  # at [CLS]
        batch["dom"] = batch["dom"].astype(np.int64)
        batch |= {name: np.ascontiguousarray(events[name][rows]) for name in labels}
        batch["starts"] = starts.astype(np.int32)
        more = {"longest": int(n_tokens.max()), "row": rows, "event_id": events["event_id"][rows]}
        if hidden is not None:
            is_hidden = hidden.take(place, mode="clip")
            is_hidden[first] = False
            batch["hidden"] = np.flatnonzero(is_hidden)
            batch["hidden_event"] = np.repeat(np.arange(len(rows)), n_tokens)[batch["hidden"]]
            more["n_scored"] = np.count_nonzero(np.diff(batch["hidden_event"], prepend=-1))
            more["n_hidden"] = len(batch["hidden"])
        batches.append({name: torch.from_numpy(array) for name, array in batch.items()} | more)
    return batches


def prefetch(load, steps, device, depth=2):
    """Yield load(step) for each step, read ahead by a thread, on the device.

    load: step -> list of dicts, whose tensors are moved. One thread is enough: it makes more masked events/s
    than a GPU trains on (see tools/bench.py), and numpy's copies do not block python's other threads. On CUDA
    it copies from pinned memory on a stream of its own, while the step before is computed.
    """
    import torch
    stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def each_tensor(change, batches):
        return [{name: change(value) if torch.is_tensor(value) else value for name, value in batch.items()}
                for batch in batches]

    def loaded(step):
        if stream is None:
            return each_tensor(lambda value: value.to(device), load(step)), None
        with torch.cuda.device(device), torch.cuda.stream(stream):  # threads begin with GPU 0
            batches = each_tensor(lambda value: value.pin_memory().to(device, non_blocking=True), load(step))
            return batches, stream.record_event()

    def arrived(batches, copied):
        if stream is not None:
            present = torch.cuda.current_stream(device)
            present.wait_event(copied)
            each_tensor(lambda value: value.record_stream(present), batches)  # not freed while it is read
        return batches

    with ThreadPoolExecutor(1) as pool:
        waiting = deque()
        for step in steps:
            waiting.append(pool.submit(loaded, step))
            if len(waiting) > depth:
                yield arrived(*waiting.popleft().result())
        while waiting:
            yield arrived(*waiting.popleft().result())
