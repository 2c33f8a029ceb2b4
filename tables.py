"""Tables that come from elsewhere, parquet or csv: read in pieces, and one line for what is not right.

prepare.py reads events and the detector with it, simulate.py and the converters in tools/ the detector.
"""
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

from common import fail, first_line

CHUNK = 2**18  # pulses at a time, some 1,600 events: arrays of 2 MB stay in the cache
MAX_FLOAT = float(np.finfo(np.float32).max)
MAX_DOMS = 65_535  # ids are uint16, and one number is left for MASK
ICECUBE_DOMS, ICECUBE_DOMS_PER_STRING = 5160, 60  # IceCube-86, sensor_id // 60 is the string
KINDS = {"integer": pa.types.is_integer, "boolean": pa.types.is_boolean,  # what a column must be of
         "number": lambda kind: pa.types.is_integer(kind) or pa.types.is_floating(kind)}


def refuse(bad, path, row, what):
    """Stop with one line at the first bad row, if any. bad: bool per row; row: number of the first."""
    if bad.any():
        index = int(np.argmax(bad))
        fail(f"{path}: row {row + index}: {what(index)}")


def refuse_outside(values, low, high, path, row, name):
    if len(values) and not (values.min() >= low and values.max() <= high):  # NaN fails as well
        refuse(~((values >= low) & (values <= high)), path, row,
               lambda i: f"{name} is {values[i]}, must lie in {low}..{high:.4g}; damaged or of another kind")


def open_parquet(path, columns, optional=(), kinds=KINDS):
    """Open a parquet file, check that it has the columns (name: kind) -> file, names of those it has."""
    if not path.is_file():
        fail(f"{path}: no such file; check input_dir and splits")
    try:
        # pieces of 1 MB: the default holds all that was read of a file, 9 GB of the full train_meta.parquet
        file = pq.ParquetFile(path, buffer_size=2**20, pre_buffer=False)
    except (pa.ArrowException, OSError) as error:
        fail(f"{path}: not a readable parquet file ({first_line(error)}); cut off or damaged, get it anew")
    # flatten: field t of a struct photons is named photons.t
    schema, found = file.schema_arrow.empty_table().flatten().schema, []
    for name, wanted in (columns | dict(optional)).items():
        if name in schema.names:
            kind = schema.field(name).type
            if not kinds[wanted](kind.value_type if pa.types.is_dictionary(kind) else kind):
                fail(f"{path}: column {name} is of type {kind}, need {wanted}; write it anew")
            found.append(name)
        elif name in columns:
            fail(f"{path}: no column {name}, only {', '.join(schema.names)}; is it the right file?")
    return file, found


def read_batches(file, path, columns, n_rows):
    """Yield (row, RecordBatch) over a parquet file, n_rows at a time; row: number of the first of them."""
    row = 0
    batches = file.iter_batches(n_rows, columns=columns, use_threads=False)  # one core per worker
    while True:
        try:
            batch = next(batches, None)
        except (pa.ArrowException, OSError) as error:
            fail(f"{path}: damaged after row {row} ({first_line(error)}); get it anew")
        if batch is None:
            return
        yield row, batch
        row += len(batch)


def to_numpy(array, path, row, name):
    if array.null_count:
        refuse(array.is_null().to_numpy(zero_copy_only=False), path, row,
               lambda i: f"no value in {name}; write it anew")
    if pa.types.is_dictionary(array.type):
        array = array.dictionary_decode()
    return array.to_numpy(zero_copy_only=False)


# ------------------------------------------------------------------------------------------------------------
# the detector
# ------------------------------------------------------------------------------------------------------------

@dataclass(frozen=True, eq=False)  # hashed by identity: what follows from a detector is cached
class Detector:
    position: np.ndarray  # (3, V) float64 [m], one row per coordinate, for speed; column = sensor_id
    string: np.ndarray  # (V,) number of the string, counted from 0

    def __len__(self):
        return len(self.string)


def read_detector(path):
    """sensor_geometry.csv (columns sensor_id, x, y, z [m] and perhaps string) -> Detector.

    Without strings, 5160 rows are IceCube-86; in any other table DOMs of equal x, y are a string.
    """
    if not path.is_file():
        fail(f"{path}: no such file; it tells where the DOMs are; simulate.py writes one beside its events")
    try:
        table = pa.csv.read_csv(path)
    except (pa.ArrowException, OSError) as error:
        fail(f"{path}: not a readable table ({first_line(error)}); it needs the columns sensor_id,x,y,z")
    columns = []
    wanted = {"sensor_id": "integer", "x": "number", "y": "number", "z": "number"}
    for name, kind in (wanted | ({"string": "integer"} if "string" in table.column_names else {})).items():
        if name not in table.column_names or not KINDS[kind](table[name].type):
            fail(f"{path}: no column {name} of type {kind}; it must begin with the line sensor_id,x,y,z")
        columns.append(to_numpy(table[name].combine_chunks(), path, 0, name))
    dom, position, string = columns[0], np.array(columns[1:4], np.float64), columns[4:]
    if not 1 <= len(dom) <= MAX_DOMS:
        fail(f"{path}: {len(dom):,} rows, need 1 to {MAX_DOMS:,}, one per DOM")
    refuse(~np.isfinite(position).all(axis=0), path, 0,
           lambda i: f"sensor_id {dom[i]} has no finite position; get it anew")
    refuse_outside(dom, 0, MAX_DOMS - 1, path, 0, "sensor_id")
    count = np.bincount(dom)
    if (count != 1).any():
        bad = int(np.argmax(count != 1))
        fail(f"{path}: sensor_id {bad} is {'missing' if count[bad] == 0 else 'there twice'}; get it anew")
    order = np.argsort(dom)
    position = position[:, order]
    if string:
        refuse_outside(string[0], 0, MAX_DOMS, path, 0, "string")
        string = string[0][order]
    elif len(dom) == ICECUBE_DOMS:
        string = np.arange(len(dom)) // ICECUBE_DOMS_PER_STRING
    else:
        string = np.unique(position[:2], axis=1, return_inverse=True)[1].ravel()
    return Detector(position, string.astype(np.int64))
