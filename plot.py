"""Pictures of runs and of single events. Needs matplotlib (pip install matplotlib), which nothing else here does.

    python plot.py --what=curves --runs=out/demo,out/demo+gru             loss and learning rate over steps
    python plot.py --what=errors --runs=out/demo_finetune                 angular error: histogram, against energy and pulses
    python plot.py --what=calibration --runs=out/vmf                      is the predicted uncertainty right? (direction_loss vmf)
    python plot.py --what=labels --runs=out/a,out/b,out/c,out/d           error against number of labels, pretrained or not
    python plot.py --what=scaling --runs=out/a,out/b,out/c --x=events     validation loss against events seen or parameters
    python plot.py --what=study --study=embedding --x=learning_rate       results of study.py, with the spread over seeds
    python plot.py --what=event --data_dir=data/demo --event=5 --runs=out/demo,out/demo_finetune

Each writes one .png, in a second or two, and prints its name. errors, calibration and labels read the
evaluation_<split>.json that finetune.py leaves in a run's folder. event shows the model's guesses for hidden DOMs if runs
holds a pretraining run, and the reconstructed direction if it holds one of fine-tuning.
"""
import common  # first: it sets how torch's threads wait

import csv
import importlib.util
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import SimpleNamespace

import numpy as np

import data
from study import METRICS, best_rate, final_rows, read_results, value

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")  # Okabe & Ito: told apart by all eyes
STYLES = ("-", "--", ":", "-.")  # after seven colours
AXES = {"val_angle_mean": "mean angular error [deg]", "val_angle_median": "median angular error [deg]", "val_dom_loss": "DOM loss",
        "val_charge_rms": "charge error, rms of log10 [dex]", "val_distance": "best guess off by [m]", "events": "events seen",
        "learning_rate": "learning rate", "number": "number in the arm's name", "seconds": "seconds of training"}


@dataclass
class PlotConfig:
    what: str = "curves"  # or "errors", "calibration", "labels", "scaling", "study", "event"
    runs: str = ""  # folders of runs, separated by commas
    split: str = "val"  # whose evaluation_<split>.json; event: the split it is in
    x: str = "events"  # scaling: against "events" seen or "parameters"; study: or "learning_rate", "number" of the arm, "seconds"
    y: str = "val_dom_loss"  # scaling, study: a column of log.csv or of the results
    study: str = ""  # study: its name, or several separated by commas
    results: str = "out/study/results.csv"  # study: the file that study.py wrote
    fit: bool = False  # study: a power law through each arm
    x_label: str = ""  # study: what the number in an arm's name means; "" = x
    baselines: dict = field(default_factory=dict)  # study: horizontal lines to draw, name to height
    data_dir: str = "data/demo"  # event: the data folder it is in
    event: int = 0  # event: its place in the split
    hide: float = 0.25  # event: share of good pulses whose DOM is hidden
    out: str = ""  # the .png to write; "" = out/<what>.png

    def check(self):
        yield from common.check_choice(self, "what", PLOTS)
        xs = {"scaling": ("events", "parameters"), "study": ("events", "parameters", "learning_rate", "number", "seconds")}
        yield from common.check_choice(self, "x", xs.get(self.what, xs["study"]))
        yield from common.check_not_negative(self, "event")
        yield from common.check_share(self, "hide")
        if not self.runs and self.what not in ("event", "study"):
            yield "runs is empty: name one or more folders of runs, separated by commas"
        if self.what == "study":
            yield from common.check_choice(self, "y", METRICS)
            if not self.study:
                yield "study is empty: name one or more studies, separated by commas"
            if self.fit and self.x not in ("number", "parameters"):
                yield f"fit = True: a power law is for runs that have ended, over x = 'number' or 'parameters', not over {self.x!r}"
        if importlib.util.find_spec("matplotlib") is None:
            yield "plot.py needs matplotlib: pip install matplotlib"


# ----------------------------------------------------------------------------------------------------------------------
# what runs left behind
# ----------------------------------------------------------------------------------------------------------------------

def read_log(run):
    """log.csv -> dict of float arrays, NaN where a cell is empty."""
    path = Path(run) / "log.csv"
    if not path.is_file():
        common.fail(f"{path}: no such file; runs are folders that train.py or finetune.py wrote")
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    if not rows:
        common.fail(f"{path}: holds no row yet; wait for the run's first log line")
    try:
        return {name: np.array([float(row[name] or "nan") for row in rows]) for name in rows[0]}
    except (TypeError, ValueError):
        common.fail(f"{path}: damaged, not all its cells are numbers")


def read_evaluation(run, split):
    path = Path(run) / f"evaluation_{split}.json"
    if not path.is_file():
        common.fail(f"{path}: no such file; it must be a run of finetune.py, evaluated with: python finetune.py --eval_only=True "
                    f"--out_dir={run} --val_split={split} --data_dir=...")
    return common.read_json(path)


def name_of(run):
    return Path(run).name


def looks(i):
    return {"color": COLORS[i % len(COLORS)], "linestyle": STYLES[i // len(COLORS) % len(STYLES)]}


# ----------------------------------------------------------------------------------------------------------------------
# runs
# ----------------------------------------------------------------------------------------------------------------------

def curves(config, runs, plt):
    figure, (above, below) = plt.subplots(2, 1, figsize=(7, 6), sharex=True, height_ratios=(3, 1), layout="constrained")
    for i, run in enumerate(runs):
        log = read_log(run)
        at = ~np.isnan(log["loss"])
        above.plot(log["step"][at], log["loss"][at], alpha=0.6, linewidth=1, label=name_of(run), **looks(i))
        at = ~np.isnan(log["val_loss"]) & (log["step"] > 0)
        above.plot(log["step"][at], log["val_loss"][at], "o", markersize=5, color=COLORS[i % len(COLORS)])
        at = ~np.isnan(log["lr"])
        below.plot(log["step"][at], log["lr"][at], **looks(i))
    above.set(ylabel="loss (line: training, dots: validation)")
    below.set(xlabel="step", ylabel="learning rate", ylim=(0, None))
    above.legend()
    return figure


def errors(config, runs, plt):
    """Of the first run: histogram; of all: mean error in bins. Line fit beside them."""
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(13, 4), layout="constrained")
    for i, run in enumerate(runs):
        found = read_evaluation(run, config.split)
        if found["task"] != "direction":
            common.fail(f"{run} reconstructs the {found['task']}; errors shows angular errors")
        edges, fit, share = (np.array(found["histogram"][name]) for name in ("edges", "fit_error", "error"))
        edges, fit, share = np.degrees(edges), fit / found["n_events"], share / found["n_events"]
        if i == 0:
            left.stairs(fit, edges, color="0.55", label="line fit", fill=True, alpha=0.4)
        left.stairs(share, edges, label=name_of(run), linewidth=1.5, **looks(i))
        for axis, kind in ((middle, "energy"), (right, "pulses")):
            rows = [row for row in found["rows"] if row["kind"] == kind]
            places = np.arange(len(rows))
            axis.errorbar(places + 0.06 * i, np.degrees([row["median"] for row in rows]),
                          np.degrees([row["median_error"] for row in rows]), label=name_of(run), marker="o", capsize=3, **looks(i))
            if i == 0:
                axis.plot(places, np.degrees([row["line_fit_median"] for row in rows]), color="0.55", marker="s", label="line fit")
                axis.set_xticks(places, [row["bin"].replace(" to ", "\nto ") for row in rows], fontsize=7)
    left.set(xlabel="angular error [deg]", ylabel="share of events", xlim=(0, 180))
    middle.set(xlabel="energy", ylabel="median angular error [deg]", ylim=(0, None))
    right.set(xlabel="pulses of the event", ylabel="median angular error [deg]", ylim=(0, None))
    left.legend()
    return figure


def calibration(config, runs, plt):
    figure, axis = plt.subplots(figsize=(5, 5), layout="constrained")
    axis.plot([0, 100], [0, 100], color="0.55", linewidth=1, label="right")
    for i, run in enumerate(runs):
        found = read_evaluation(run, config.split)
        if "calibration" not in found:
            common.fail(f"{run} knows no uncertainty: train it with a direction_loss that holds vmf")
        axis.plot(100 * np.array(found["calibration"]["level"]), 100 * np.array(found["calibration"]["inside"]), marker="o",
                  markersize=4, label=name_of(run), **looks(i))
    axis.set(xlabel="predicted probability of a contour [%]", ylabel="events inside it [%]", xlim=(0, 100), ylim=(0, 100))
    axis.set_aspect("equal")
    axis.text(97, 4, "below the line: too sure of itself", ha="right", fontsize=8, color="0.4")
    axis.legend()
    return figure


def labels(config, runs, plt):
    """Runs are put together by how they began: pretrained, frozen, from scratch; several of one kind and size: mean and spread."""
    groups, tasks = {}, set()
    for run in runs:
        found = read_evaluation(run, config.split)
        tasks.add(found["task"])
        if len(tasks) > 1:
            common.fail(f"{run} reconstructs the {found['task']}, the runs before it do not; they cannot share an axis")
        kind = "from scratch" if not found["pretrained"] else "pretrained, frozen" if found["freeze_backbone"] else "pretrained"
        whole = found["rows"][0]
        name, scale = ("mean", np.degrees(1)) if found["task"] == "direction" else ("resolution", 1)
        groups.setdefault(kind, {}).setdefault(found["n_train"], []).append((whole[name] * scale, whole[f"{name}_error"] * scale))
        unit = "mean angular error [deg]" if found["task"] == "direction" else "energy resolution [dex]"
    figure, axis = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for i, (kind, sizes) in enumerate(sorted(groups.items())):
        n = sorted(sizes)
        values = [np.array(sizes[k]) for k in n]  # (runs, 2)
        spread = [value[:, 0].std() if len(value) > 1 else value[0, 1] for value in values]
        axis.errorbar(n, [value[:, 0].mean() for value in values], spread, label=kind, marker="o", capsize=3, **looks(i))
    axis.set(xscale="log", xlabel="labelled events", ylabel=unit)
    axis.legend()
    return figure


def scaling(config, runs, plt):
    """The last value of a column of log.csv against events seen or parameters, with a power law through the points."""
    points = []
    for run in runs:
        log = read_log(run)
        if config.y not in log or np.isnan(log[config.y]).all():
            common.fail(f"{run}/log.csv has no {config.y}; it has {', '.join(name for name in log if name.startswith('val_'))}")
        last = np.flatnonzero(~np.isnan(log[config.y]))[-1]
        x = log["events"][last] if config.x == "events" else \
            common.count_parameters(common.load_checkpoint(Path(run) / "ckpt.pt")["model"])
        points.append((x, log[config.y][last], name_of(run)))
    x, y, names = zip(*sorted(points))
    figure, axis = plt.subplots(figsize=(7, 4.5), layout="constrained")
    axis.plot(x, y, "o", color=COLORS[0])
    for point in zip(x, y, names):
        axis.annotate(point[2], point[:2], xytext=(4, 4), textcoords="offset points", fontsize=7, color="0.35")
    if len(set(x)) > 2:
        draw_power_law(axis, np.array(x), np.array(y), color="0.55")
        axis.legend()
    axis.set(xscale="log", yscale="log", xlabel={"events": "events seen", "parameters": "parameters"}[config.x], ylabel=config.y)
    axis.yaxis.set_minor_formatter("{x:.3g}")
    return figure


def draw_power_law(axis, x, y, name="", **how):
    u, v = np.log(x), np.log(y)
    slope, offset = np.polyfit(u, v, 1)
    rest = v - slope * u - offset
    error = (rest @ rest / (len(x) - 2) / np.square(u - u.mean()).sum()) ** 0.5  # of the slope, from the scatter of the points
    grid = np.geomspace(min(x), max(x))
    axis.plot(grid, np.exp(offset) * grid**slope, linewidth=1, label=f"{name} power {slope:.3f} $\\pm$ {error:.3f}", **how)


def points_of_study(config, results, name):
    """What is drawn of one study: yields the name of a line, x, and the row of results with y."""
    final = final_rows(results, name)
    if not final:
        common.fail(f"{config.results} has no study {name}; it has {', '.join(sorted({row['study'] for row in results})) or 'none'}")
    for arm in dict.fromkeys(arm for arm, _, _ in final):
        best, (line, _, number) = best_rate(final, arm), arm.rpartition("/")
        runs = [row for (other, rate, _), row in final.items() if other == arm and rate == best]
        if config.x == "learning_rate":
            yield from ((arm, rate, row) for (other, rate, _), row in final.items() if other == arm)
        elif config.x == "parameters":
            yield from ((line or name, value(row, "parameters"), row) for row in runs)
        elif config.x == "number":
            if not line or not number.replace(".", "", 1).isdigit():
                common.fail(f"{config.results}: arm {arm} of {name} has no number in its name; choose another --x=")
            yield from ((line, float(number), row) for row in runs)
        else:
            scale = np.nanmean([1 / value(row, "events_per_s") for row in runs]) if config.x == "seconds" else 1
            yield from ((arm, value(row, "events") * scale, row) for row in results
                        if (row["study"], row["arm"], float(row["learning_rate"])) == (name, arm, best))


def study(config, runs, plt):
    """Results of study.py, mean and standard deviation over seeds; a run that diverged is left out, with a word.

    Against the learning rate: one line an arm. Against the number in an arm's name (pretrained/500) or parameters: the best
    learning rate of each, one line for arms that share what stands before the number. Against events or seconds: their curves.
    """
    results, lines = read_results(config.results), {}  # name of a line -> x -> values, one a seed
    names = [name.strip() for name in config.study.split(",")]
    for name in names:
        for line, x, row in points_of_study(config, results, name):
            if row["step"] == "0":
                print(f"note: {name}, arm {row['arm']}, learning rate {row['learning_rate']}, seed {row['seed']} diverged, it is not drawn")
            elif row[config.y]:
                line = f"{name}: {line}" if len(names) > 1 and line != name else line
                lines.setdefault(line, {}).setdefault(x, []).append(value(row, config.y))
    if not lines:
        common.fail(f"{config.results}: {config.y} is empty in {config.study}")
    scale = np.degrees(1) if config.y.startswith("val_angle") else 1
    figure, axis = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for i, (line, points) in enumerate(lines.items()):
        x = np.array(sorted(points))
        mean, spread = np.array([(np.mean(points[k]), np.std(points[k], ddof=len(points[k]) > 1)) for k in x]).T * scale
        axis.errorbar(x, mean, spread, label=line, marker="o", markersize=4, capsize=3, **looks(i))
        if config.fit and len(x) > 2:
            each = np.array([(k, y * scale) for k in x for y in points[k]])  # not the means: the slope's error knows the spread
            draw_power_law(axis, *each.T, line, color=COLORS[i % len(COLORS)], alpha=0.5)
    axis.set(xscale="linear" if config.x == "seconds" or min(map(min, lines.values())) <= 0 else "log",
             xlabel=config.x_label or AXES.get(config.x, config.x), ylabel=AXES.get(config.y, config.y))
    for name, height in config.baselines.items():
        axis.axhline(height * scale, color="0.55", linewidth=1, linestyle="--")
        axis.annotate(name, (1, height * scale), xycoords=("axes fraction", "data"), ha="right", va="bottom", fontsize=8, color="0.4")
    if config.fit:
        axis.set_yscale("log")
        axis.yaxis.set_minor_formatter("{x:.3g}")
    if len(lines) > 1 or config.fit:
        axis.legend()
    return figure


# ----------------------------------------------------------------------------------------------------------------------
# one event
# ----------------------------------------------------------------------------------------------------------------------

def load_model(run, geometry, data_dir):
    """The best model of a run (pretraining or fine-tuning) and its config."""
    from model import ModelConfig, Pretrainer, Reconstructor
    path = Path(run) / "best.pt"
    saved = common.load_checkpoint(path)
    common.check_geometry(saved, geometry, path, data_dir)
    config = SimpleNamespace(**{**asdict(ModelConfig()), **saved["config"]})
    model = (Reconstructor if "task" in saved["config"] else Pretrainer)(config, geometry)
    model.load_state_dict(saved["model"])
    return model.eval(), config


def event(config, runs, plt):
    """The detector in 3-D; pulses coloured by time and sized by charge; directions; hidden DOMs and the model's best guesses."""
    import torch
    from model import unit_vector
    split, geometry = data.open_split(config.data_dir, config.split), data.read_geometry(config.data_dir)
    if config.event >= len(split):
        common.fail(f"{split.path} holds {len(split):,} events, numbered from 0: there is no event {config.event}")
    events, pulses = data.read_events(split, np.array([config.event]))
    hidden = (data.uniform_hash(0, 0, data.pulse_places(events)) < config.hide) & ~pulses["aux"]
    place, truth = geometry[pulses["dom"]], events[0]

    figure = plt.figure(figsize=(8.5, 7.5), layout="constrained")
    axis = figure.add_subplot(projection="3d")
    for string in geometry.reshape(-1, data.DOMS_PER_STRING, 3):
        axis.plot(*string[[0, -1]].T, color="0.85", linewidth=0.6, zorder=0)
    size = 14 * (1 + np.log10(np.maximum(pulses["charge"], 0.1) / 0.1)) ** 1.5
    aux = pulses["aux"]
    axis.scatter(*place[aux].T, c="0.6", s=size[aux] / 3, alpha=0.5, linewidths=0, label="aux (noise)")
    shown = axis.scatter(*place[~aux].T, c=pulses["time"][~aux], s=size[~aux], cmap="viridis", alpha=0.9, linewidths=0)
    figure.colorbar(shown, ax=axis, shrink=0.6, pad=0.08, label="time [ns]")
    center = np.average(place[~aux] if (~aux).any() else place, axis=0)

    def arrow(towards, **how):  # the neutrino came from there
        axis.plot(*np.stack([center - 450 * towards, center + 450 * towards]).T, linewidth=2, **how)
        axis.plot(*(center + 450 * towards)[:, None], marker="o", markersize=6, color=how["color"])

    title = f"event {truth['event_id']}: {truth['n_pulses']:,} pulses, {truth['total_charge']:.0f} p.e."
    if not np.isnan(truth["azimuth"]):
        true = unit_vector(*torch.tensor([float(truth["azimuth"]), float(truth["zenith"])])).numpy()
        arrow(true, color=COLORS[1], label="true direction (dot: source)")
    for run in runs:
        model, knobs = load_model(run, geometry, config.data_dir)
        batch, = data.micro_batches(events, pulses, 1, hidden)
        with torch.no_grad():
            if not hasattr(knobs, "task"):
                if hidden.any():
                    best = model.predict(batch)[0].topk(3).indices.T.numpy()  # (3, M)
                    right = (best[0] == pulses["dom"][hidden]).sum()
                    for a, b in zip(place[hidden], geometry[best[0]]):
                        axis.plot(*np.stack([a, b]).T, color=COLORS[3], linewidth=0.8)
                    axis.scatter(*place[hidden].T, s=70, facecolors="none", edgecolors=COLORS[3], linewidths=1.2,
                                 label="hidden DOM")
                    names = (f"best guess ({right} of {len(best[0])} right)", "second, third", None)
                    for guess, alpha, label in zip(best, (1, 0.6, 0.4), names):
                        axis.scatter(*geometry[guess].T, marker="x", s=40, color=COLORS[3], alpha=alpha, label=label)
            elif knobs.task == "direction":
                batch.pop("hidden")
                found = model(batch)["direction"][0].numpy()
                label = f"{name_of(run)}"
                if not np.isnan(truth["azimuth"]):
                    label += f", off by {np.degrees(np.arccos(np.clip(found @ true, -1, 1))):.0f} deg"
                arrow(found, color=COLORS[0], linestyle="--", label=label)
    axis.set(xlabel="x [m]", ylabel="y [m]", zlabel="z [m]", title=title)
    axis.locator_params(nbins=4)
    axis.set_box_aspect((1, 1, 1))
    axis.set_xlim(-600, 600), axis.set_ylim(-600, 600), axis.set_zlim(-600, 600)
    axis.view_init(elev=12, azim=-60)
    axis.legend(loc="upper left", fontsize=8)
    return figure


PLOTS = {plot.__name__: plot for plot in (curves, errors, calibration, labels, scaling, study, event)}


def main():
    config = common.load_config(PlotConfig, __doc__)
    import matplotlib
    matplotlib.use("Agg")  # no window is needed
    import matplotlib.pyplot as plt
    plt.rcParams.update({"axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "axes.axisbelow": True,
                         "grid.color": "0.92", "legend.frameon": False, "font.size": 10})
    figure = PLOTS[config.what](config, [run.strip() for run in config.runs.split(",") if run.strip()], plt)
    path = config.out or f"out/{config.what}.png"
    common.write_atomic(path, lambda part: figure.savefig(part, format="png", dpi=150))
    print(path)


if __name__ == "__main__":
    common.run_stage(main)
