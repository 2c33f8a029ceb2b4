"""tools.plot draws from what real runs left behind. People judge how a figure looks, tests what it says."""
import json
import shutil

import numpy as np
import pytest

import common
from conftest import random_events, run_ok, user_error, write_folder
from test_finetune import KNOBS
from tools import plot, study

plt = pytest.importorskip("matplotlib.pyplot")


@pytest.fixture(autouse=True)
def closed_figures():
    yield
    plt.close("all")


@pytest.fixture(scope="module")
def tuned(demo_data, pretrained, tmp_path_factory):
    """Fine-tuning runs: two of the direction, with 50 and 150 labels, one of the energy, one of the class."""
    folder = tmp_path_factory.mktemp("tuned")
    for name, knobs in (("50", ["--train_events=50", "--direction_loss=vmf"]),
                        ("150", ["--direction_loss=vmf"]), ("energy", ["--task=energy"]),
                        ("class", ["--task=class"])):
        run_ok("finetune.py", f"--data_dir={demo_data}", *KNOBS, f"--out_dir={folder}/{name}",
               "--max_steps=3", *knobs, f"--pretrained={pretrained[0]}/ckpt.pt")
    return folder


def test_every_figure(demo_data, pretrained, tuned, tmp_path):
    both = f"{tuned}/50,{tuned}/150"
    for what, runs, more in (("curves", pretrained[0], []), ("curves", both, []), ("errors", both, []),
                             ("errors", f"{tuned}/energy", []), ("calibration", both, []),
                             ("labels", both, []), ("labels", f"{tuned}/energy", []),
                             ("errors", f"{tuned}/class", []), ("labels", f"{tuned}/class", []),
                             ("scaling", both, ["--y=val_loss"]),
                             ("scaling", str(pretrained[0]), ["--x=parameters"]),
                             ("event", f"{pretrained[0]},{tuned}/50",
                              [f"--data_dir={demo_data}", "--event=3"]),
                             ("event", f"{tuned}/50", [f"--data_dir={demo_data}", "--split=test"])):
        path = tmp_path / f"{what}.png"
        run_ok("tools/plot.py", f"--what={what}", f"--runs={runs}", f"--out={path}", *more)
        assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" and path.stat().st_size > 10_000
        path.unlink()


def test_curves_show_the_dom_loss_from_the_first_evaluation_to_the_last(pretrained):
    above = plot.curves(plot.PlotConfig(), [pretrained[0]], plt).axes[0]
    training, evaluations, guessing = above.get_lines()
    assert evaluations.get_xdata().tolist() == [0, 3,
                                                6] and training.get_xdata().tolist() == [0, 1, 2, 3, 4, 5]
    assert evaluations.get_ydata() == pytest.approx(plot.read_log(pretrained[0])["val_dom_loss"][[0, 3, 6]])
    assert guessing.get_ydata()[0] == pytest.approx(np.log(5160)) and above.get_yscale() == "log"


def test_bins_are_matched_by_name(tuned, tmp_path):
    """Of the second run's events too few lie in some bins; each point must stay above its own label."""
    runs = [tmp_path / "a", tmp_path / "b"]
    for run in runs:
        shutil.copytree(tuned / "150", run)
    for run, rates in zip(runs, ({"1 to 31": 0.1, "32 to 63": 0.2, "128 to 255": 0.4},
                                 {"32 to 63": 0.7, "64 to 127": 0.8})):
        found = common.read_json(run / "evaluation_val.json")
        found["rows"] = [{"kind": "pulses", "bin": name, "n": 12, "median": median, "median_error": 0.01,
                          "line_fit_median": 1.0} for name, median in rates.items()]
        (run / "evaluation_val.json").write_text(json.dumps(found))
    axis = plot.errors(plot.PlotConfig(what="errors"), list(map(str, runs)), plt).axes[2]
    assert [label.get_text().split("\n")[0] for label in axis.get_xticklabels()] == ["1", "32", "64", "128"]
    assert all(label.get_text().endswith("n = 12") for label in axis.get_xticklabels())
    a, b = (container.lines[0] for container in axis.containers)
    assert np.round(a.get_xdata()).tolist() == [0, 1, 3] and np.round(b.get_xdata()).tolist() == [1, 2]
    assert [np.radians(float(y)) for y in b.get_ydata()] == pytest.approx([0.7, 0.8])


def test_an_evaluation_of_other_weights_is_refused(tuned, tmp_path):
    shutil.copytree(tuned / "50", tmp_path / "run")
    found = common.read_json(tmp_path / "run/evaluation_val.json")
    (tmp_path / "run/evaluation_val.json").write_text(json.dumps(found | {"step": found["step"] + 1}))
    line = user_error("tools/plot.py", "--what=errors", f"--runs={tmp_path}/run")
    assert "evaluation_val.json is of best.pt at step" in line and "python evaluate.py" in line


@pytest.mark.parametrize("length", [1, 2])
def test_events_of_next_to_no_pulses_are_drawn(tmp_path, length):
    for aux in (True, False):
        events, pulses = random_events(np.random.default_rng(0), [length])
        pulses["aux"] = aux
        folder = write_folder(tmp_path / f"data_{aux}", val=(events, pulses))
        run_ok("tools/plot.py", "--what=event", f"--data_dir={folder}", f"--out={tmp_path}/event.png")


def study_rows(name, arms):
    """arms: name -> learning rate -> val_dom_loss of each seed."""
    return [dict.fromkeys(study.RESULTS, "") | {"study": name, "arm": arm, "learning_rate": f"{rate:g}",
                                                "seed": str(seed), "step": "600",
                                                "events": str(100 * int(arm.rpartition("/")[2])),
                                                "metric": "val_dom_loss", "val_dom_loss": str(loss)}
            for arm, rates in arms.items() for rate, losses in rates.items()
            for seed, loss in enumerate(losses, 1)]


def test_a_study_over_widths(tmp_path):
    study.add_results(tmp_path / "r.csv", study_rows("width", {
        "standard/32": {0.005: [5.0, 5.2], 0.01: [6.0]}, "muP/32": {0.005: [5.1, 5.1], 0.01: [5.5]},
        "standard/128": {0.005: [4.0, 4.1], 0.01: [4.2]}, "muP/128": {0.005: [5.0], 0.01: [4.2, 4.4]}}))
    config = plot.PlotConfig(what="study", study="width", x="learning_rate", results=f"{tmp_path}/r.csv")
    axis = plot.study(config, [], plt).axes[0]
    lines = [container.lines[0] for container in axis.containers]
    names = [text.get_text() for text in axis.get_legend().texts]
    assert names == ["standard/32", "standard/128", "muP/32", "muP/128"]
    assert lines[0].get_color() == lines[2].get_color() != lines[1].get_color() == lines[3].get_color()
    styles = [line.get_linestyle() for line in lines]
    assert styles[0] == styles[1] != styles[2] == styles[3]
    assert [label.get_text() for label in axis.get_xticklabels()] == ["0.005", "0.01"]
    bars = axis.containers[0].lines[2][0].get_segments()  # two seeds at 0.005, one at 0.01: no bar
    assert np.ptp(bars[0][:, 1]) == pytest.approx(2 * np.std([5.0, 5.2], ddof=1))
    assert len(bars) == 1 or np.isnan(np.array(bars[1])).any() or len(bars[1]) == 0


def test_runs_of_several_lengths_are_one_line(tmp_path):
    arms = {f"branched/{n}": {0.01: [9 - n / 1000]} for n in (800, 1200, 1600)}
    study.add_results(tmp_path / "r.csv", study_rows("branches", arms))
    config = plot.PlotConfig(what="study", study="branches", results=f"{tmp_path}/r.csv")
    container, = plot.study(config, [], plt).axes[0].containers
    study.add_results(tmp_path / "r.csv", study_rows("longer", {"branched/3200": {0.01: [6]}}))
    config.study = "branches,longer"
    assert len(plot.study(config, [], plt).axes[0].containers) == 2
    config.arms = {"branched": "cut off"}
    joined, = plot.study(config, [], plt).axes[0].containers
    assert joined.get_label() == "cut off" and joined.lines[0].get_xdata()[-1] == 320_000
    config.arms = {"nothing": "else"}
    with pytest.raises(SystemExit, match="is empty in branches,longer"):
        plot.study(config, [], plt)
    assert container.get_label() == "branched"
    assert container.lines[0].get_xdata().tolist() == [80_000, 120_000, 160_000]


def test_power_laws_above_a_floor(tmp_path, capsys):
    """y = 2 + 8 parameters^-0.25 number^-0.5, what lies above 2 half a percent up and down."""
    rows = []
    for width in (10, 100, 1000):
        for number in (100, 400, 1600):
            ends = [2 + 8 * width**-0.25 * number**-0.5 * off for off in (1.005, 0.995)]
            rows += study_rows("law", {f"w{width}/{number}": {0.01: ends}})
            for row in rows[-2:]:
                row["parameters"] = str(width)
    study.add_results(tmp_path / "r.csv", rows)
    config = plot.PlotConfig(what="study", study="law", x="number", fit=True, floor=2.0,
                             results=f"{tmp_path}/r.csv")
    axis = plot.study(config, [], plt).axes[0]
    assert {text.get_text() for text in axis.texts} == {
        f"w{width}: power -0.500 $\\pm$ 0.002 above 2" for width in (10, 100, 1000)}
    assert capsys.readouterr().out == ("one law for 18 runs of 3 lines: parameters to the power -0.250 +- "
                                       "0.001, number -0.500 +- 0.001\n")
    for row in rows:  # parameters that follow the number: no law of both
        row["parameters"] = row["arm"].rpartition("/")[2]
    (tmp_path / "r.csv").unlink()
    study.add_results(tmp_path / "r.csv", rows)
    plot.study(config, [], plt)
    assert capsys.readouterr().out == ""
    config.floor = 2.1
    with pytest.raises(SystemExit, match="must be below 2.0"):
        plot.study(config, [], plt)


def test_spread_is_that_of_a_sample():
    assert study.spread([1.0, 3.0]) == pytest.approx(2**0.5) and np.isnan(study.spread([1.0]))


def test_labels_of_points_do_not_cover_each_other(pretrained, tmp_path):
    for name in "abc":
        shutil.copytree(pretrained[0], tmp_path / name)
    runs = [str(tmp_path / name) for name in "abc"]
    axis = plot.scaling(plot.PlotConfig(what="scaling"), runs, plt).axes[0]
    heights = sorted(text.get_position()[1] for text in axis.texts)
    assert len(heights) == 3 and min(np.diff(heights)) >= 10 and axis.get_legend() is None


def test_user_errors(demo_data, pretrained, tuned, tmp_path):
    runs = f"--runs={pretrained[0]}"
    assert "evaluation_val.json" in user_error("tools/plot.py", "--what=errors", runs)
    assert "log.csv: no such file" in user_error("tools/plot.py", "--what=curves", f"--runs={tmp_path}")
    assert "draw them apart" in user_error("tools/plot.py", "--what=curves", f"{runs},{tuned}/50")
    assert "cannot share an axis" in user_error("tools/plot.py", "--what=errors",
                                                f"--runs={tuned}/50,{tuned}/energy")
    assert "has no val_los" in user_error("tools/plot.py", "--what=scaling", runs, "--y=val_los")
    assert "there is no event 999" in user_error("tools/plot.py", "--what=event", f"--data_dir={demo_data}",
                                                 "--event=999")
    assert "did you mean 'curves'" in user_error("tools/plot.py", "--what=curve", runs)
