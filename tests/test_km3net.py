"""tools/km3net.py: pulses, labels and positions of files as KM3NeT's, input that is wrong."""
import sys

import numpy as np
import pytest

from conftest import run_ok, user_error
from data import read_geometry_csv
from test_prometheus import POSITION, STRING, expected_pulses, make_tracks, merge, read_events

h5py = pytest.importorskip("h5py")
TOOL = "tools/km3net.py"
DOM_ID = 100 + np.random.default_rng(0).permutation(750)  # in the files

def write_detx(path, version="v2", t0=0):
    lines = [f"20 {version}", "0.0 999999999999.9", "UTM WGS84 33N 587600.0 4016800.0 0.0", "750"]
    for dom, place in enumerate(POSITION + [900, -70, 350]):
        lines.append(f"{DOM_ID[dom]}  {STRING[dom]} {dom % 30} 2")
        for x, y, z in (place - 0.1, place + 0.1):
            lines.append(f" 1 {x} {y} {z} 0 0 1 {t0}")
    path.write_text("\n\n".join(lines))

@pytest.fixture
def files(tmp_path):
    """Two files of 20 events, the first one without a trigger -> events by event_id, options."""
    rng, events, tracks, hits = np.random.default_rng(1), {}, [], []
    for i, (azimuth, zenith, energy, dom, time) in enumerate(make_tracks(5, [300] * 40)):
        tot, triggered = rng.integers(1, 99, 300), (rng.random(300) < 0.3) & (i > 0)
        events[(1 + i // 20) * 10_000_000 + i] = azimuth, zenith, energy, dom, time, tot, triggered
        flight = -np.cos(azimuth), -np.sin(azimuth), -1 / np.tan(zenith)  # any length
        tracks += [(0, 0, 1, 1e9, i, 14), (*flight, energy / 4, i, 13), (*flight, 2e3, i, -13)]
        hits.append(np.stack([DOM_ID[dom], 5e7 + time, tot, triggered, np.full(300, i)]))
    names = "dir_x", "dir_y", "dir_z", "energy", "group_id", "type"
    for number, part in (1, hits[:20]), (2, hits[20:]):
        with h5py.File(tmp_path / f"{number}.h5", "w") as file:
            file["mc_tracks"] = np.array(tracks, [(name, "f8") for name in names])
            file["hits/dom_id"], file["hits/time"], *rest = np.concatenate(part, axis=1)
            file["hits/tot"], file["hits/triggered"], file["hits/group_id"] = map(np.int64, rest)
    write_detx(tmp_path / "a.detx")
    return events, [f"--input_dir={tmp_path}", "--events=1.h5+2.h5", "--geometry=a.detx",
                    f"--out_dir={tmp_path}/raw"]

def test_events_are_those_of_the_files(files, tmp_path):
    events, options = files
    done = run_ok(TOOL, *options)
    assert "a.detx: positions are from [900.0, -70.0, 350.0] m\n" in done.stdout
    assert "angles = 'flight': confirmed by the light of 39 tracks\n" in done.stdout
    assert np.array_equal(read_geometry_csv(tmp_path / "raw/sensor_geometry.csv")[0], POSITION)
    written = read_events(tmp_path / "raw")
    order = np.random.default_rng(0).permutation(40)
    assert [*written] == [[*events][i] for i in order]
    for number, (azimuth, zenith, energy, *hits) in events.items():
        dom, time, _ = merge(*hits[:2], 25)
        parts = [(hits[0] == d) & (hits[1] >= t) & (hits[1] <= t + 25) for d, t in zip(dom, time)]
        tot, triggered = (np.array([x[part].sum() for part in parts]) for x in hits[2:])
        wanted = expected_pulses(number, dom, time, tot / 26.4, triggered > 0)
        row, pulses = written[number]
        assert np.allclose(sorted(pulses), sorted(wanted), rtol=1e-12)
        truth = row["azimuth"], row["zenith"], row["energy"], row["event_class"]
        assert np.allclose(truth, (azimuth, zenith, energy / 4 + 2000, 1))
    assert "--splits=\"{'finetune': (1, 1), 'val': (2, 2)}\"" in done.stdout

@pytest.mark.parametrize("edit, words", [
    (lambda path: h5py.File(path / "2.h5", "a")["hits/dom_id"].write_direct(np.full(6000, 7.0)),
     "2.h5: event 200000"),
    (lambda path: write_detx(path / "a.detx", t0=3), "or its t0 are not 0"),
    (lambda path: sys.modules.update(h5py=None), "pip install km3net-testdata h5py")])
def test_wrong_input_is_one_line(files, tmp_path, monkeypatch, edit, words):
    monkeypatch.setitem(sys.modules, "h5py", h5py)  # comes back
    edit(tmp_path)
    assert words in user_error(TOOL, *files[1])
