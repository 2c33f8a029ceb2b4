"""Pictures of runs and of single events. Needs matplotlib, which nothing else does: pip install matplotlib.

    python -m tools.plot --what=curves --runs=out/demo,out/demo+gru         loss and learning rate over steps
    python -m tools.plot --what=errors --runs=out/demo_finetune          histogram, against energy and pulses
    python -m tools.plot --what=calibration --runs=out/demo_finetune     is the uncertainty right?
    python -m tools.plot --what=labels --runs=out/a,out/b,out/c,out/d       error against number of labels
    python -m tools.plot --what=scaling --runs=out/a,out/b --x=events    loss against events or parameters
    python -m tools.plot --what=study --study=cls                  results of tools.study
    python -m tools.plot --what=event --data_dir=data/demo --event=5 --runs=out/demo,out/demo_finetune

Each writes one .png, in a second or two, and prints its name. errors, calibration and labels read the
evaluation_<split>.json that finetune.py leaves in a run's folder. event shows the model's guesses for hidden
DOMs if runs holds a pretraining run, and the reconstructed direction if it holds one of fine-tuning.
"""
import common  # first: it sets how torch's threads wait

import csv
import importlib.util
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

import data
import knobs
from tasks import TASKS, angular_error, unit_vector
from tools.study import METRICS, best_rate, final_rows, number_in, read_evaluation, read_results, spread

# Okabe & Ito: told apart by all eyes
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
DASHES = ("-", "--", ":", "-.")  # after seven colours
AXES = {"val_angle_mean": "mean angular error [rad]", "val_angle_median": "median angular error [rad]",
        "report_angle_mean": "mean angular error [rad]", "report_angle_median": "median angular error [rad]",
        "val_dom_loss": "DOM loss", "val_charge_rms": "charge error, rms of log10 [dex]",
        "val_distance": "best guess off by [m]", "events": "events seen", "learning_rate": "learning rate",
        "number": "number in the arm's name", "seconds": "seconds of training"}


@dataclass
class PlotConfig:
    what: str = "curves"  # or "errors", "calibration", "labels", "scaling", "study", "event"
    runs: str = ""  # folders of runs, separated by commas
    split: str = "val"  # whose evaluation_<split>.json; event: the split it is in
    x: str = "events"  # or "parameters"; study: also "learning_rate", "number" in the arm, "seconds"
    y: str = "val_dom_loss"  # scaling, study: a column of log.csv or of the results
    study: str = ""  # study: its name, or several separated by commas
    results: str = "out/study/results.csv"  # study: the file that study.py wrote
    fit: bool = False  # scaling, study: a power law through the points
    floor: float = 0.0  # fit: what y cannot fall below; the law is for what lies above
    x_label: str = ""  # study: what the number in an arm's name means; "" = x
    arms: dict = field(default_factory=dict)  # study: the lines to draw, name to words for it; {} = all
    baselines: dict = field(default_factory=dict)  # study: horizontal lines to draw, name to height
    data_dir: str = "data/demo"  # event: the data folder it is in
    event: int = 0  # event: its place in the split
    hide: float = 0.25  # event: share of good pulses whose DOM is hidden
    out: str = ""  # the .png to write; "" = out/<what>.png

    def check(self):
        yield from knobs.check_choice(self, "what", PLOTS)
        xs = {"scaling": ("events", "parameters"), "study": ("events", "parameters", "learning_rate",
                                                             "number", "seconds")}
        yield from knobs.check_choice(self, "x", xs.get(self.what, xs["study"]))
        yield from knobs.check_not_negative(self, "event")
        yield from knobs.check_fraction(self, "hide")
        if self.floor and not self.fit:
            yield "floor is where a power law ends: it needs fit = True"
        if not self.runs.strip(", ") and self.what not in ("event", "study"):
            yield "runs is empty: name one or more folders of runs, separated by commas"
        if self.what == "study":
            yield from knobs.check_choice(self, "y", METRICS)
            if not self.study.strip(", "):
                yield "study is empty: name one or more studies, separated by commas"
            if self.fit and self.x not in ("number", "parameters"):
                yield ("fit = True: a power law is for runs that have ended, over x = 'number' or "
                       f"'parameters', not over {self.x!r}")
        if importlib.util.find_spec("matplotlib") is None:
            yield "tools.plot needs matplotlib: pip install matplotlib"


# ------------------------------------------------------------------------------------------------------------
# what runs left behind
# ------------------------------------------------------------------------------------------------------------

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


def read_evaluations(runs, split):
    """study.read_evaluation of each run; says so if they are not of the same events."""
    found = [read_evaluation(run, split) for run in runs]
    if len({(one["data"], one["n_events"]) for one in found}) > 1:
        print("note: these runs were evaluated on different events")
    return found


def task_of(runs, evaluations):
    """The task of fine-tuning runs, which must share one; and the scale and unit in which it is drawn."""
    names = [found["task"] for found in evaluations]
    for run, name in zip(runs, names):
        if name != names[0]:
            common.fail(f"{run} reconstructs the {name}, the runs before it do not; they cannot share an "
                        "axis")
    task = TASKS[names[0]]
    if task.unit == "rad":
        return task, np.degrees(1), " [deg]"
    return task, 1, f" [{task.unit}]" if task.unit else ""


def name_of(run):
    return Path(run).name


def style(i, dashes=None):
    dashes = i // len(COLORS) if dashes is None else dashes
    return {"color": COLORS[i % len(COLORS)], "linestyle": DASHES[dashes % len(DASHES)]}


def plain_log(axis, ticks=()):
    """A logarithmic x or y axis with plain numbers: at these values, or at round ones."""
    from matplotlib.ticker import LogLocator, MaxNLocator
    axis._set_axes_scale("log")
    low, high = axis.get_view_interval()
    if len(ticks):
        axis.set_ticks(ticks, labels=[f"{float(f'{tick:.4g}'):,.10g}" for tick in ticks])
    else:
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)) if high > 5 * low else MaxNLocator(7))
        axis.set_major_formatter("{x:,.10g}")
    axis.set_ticks([], minor=True)


# ------------------------------------------------------------------------------------------------------------
# runs
# ------------------------------------------------------------------------------------------------------------

def curves(config, runs, plt):
    """Training as a line, evaluations as dots: the DOM loss of pretraining, or the loss of fine-tuning."""
    logs = [read_log(run) for run in runs]
    is_pretraining = ["dom_loss" in log for log in logs]
    if len(set(is_pretraining)) > 1:
        common.fail(f"{config.runs}: runs of pretraining and of fine-tuning have different losses; draw them "
                    "apart")
    name = "dom_loss" if is_pretraining[0] else "loss"
    figure, (above, below) = plt.subplots(2, 1, figsize=(7, 6), sharex=True, height_ratios=(3, 1),
                                          layout="constrained")
    for i, (run, log) in enumerate(zip(runs, logs)):
        at = ~np.isnan(log[name])
        above.plot(log["step"][at], log[name][at], alpha=0.6, linewidth=1, label=name_of(run), **style(i))
        at = ~np.isnan(log[f"val_{name}"])
        above.plot(log["step"][at], log[f"val_{name}"][at], "o", markersize=5, color=COLORS[i % len(COLORS)])
        at = ~np.isnan(log["lr"])
        below.plot(log["step"][at], log["lr"][at], **style(i))
    if is_pretraining[0]:
        weights = common.load_checkpoint(f"{runs[0]}/ckpt.pt")["model"]
        n_doms = len(weights["encoder.embedding.geometry"])
        above.axhline(np.log(n_doms), color="0.55", linewidth=1, linestyle="--")
        above.annotate(f"guessing, ln {n_doms}", (1, np.log(n_doms)), ha="right", va="bottom",
                       fontsize=8, color="0.4", xycoords=("axes fraction", "data"))
        plain_log(above.yaxis)
    above.set(ylabel=f"{'DOM loss' if is_pretraining[0] else 'loss'} (line: training, dots: validation)")
    below.set(xlabel="step", ylabel="learning rate", ylim=(0, None))
    above.legend(loc="lower left" if is_pretraining[0] else "best")
    return figure


def errors(config, runs, plt):
    """Histogram of the errors, and how large they are in bins of energy and pulses; beside them the line fit,
    where that is a baseline.
    """
    evaluations = read_evaluations(runs, config.split)
    task, scale, unit = task_of(runs, evaluations)
    statistic = list(task.drawn)[0]
    figure, (left, *others) = plt.subplots(1, 3, figsize=(13, 4.3), layout="constrained")
    for i, (run, found) in enumerate(zip(runs, evaluations)):
        shares = {name: np.array(found["histogram"][name]) for name in found["histogram"]}
        edges = shares.pop("edges") * scale
        if i == 0 and "fit_error" in shares:
            left.stairs(shares["fit_error"] / found["n_events"], edges, color="0.55", label="line fit",
                        fill=True, alpha=0.4)
        left.stairs(shares["error"] / found["n_events"], edges, label=name_of(run), linewidth=1.5, **style(i))
    for axis, kind in zip(others, ("energy", "pulses")):
        tables = [{row["bin"]: row for row in found["rows"] if row["kind"] == kind} for found in evaluations]
        every_bin = set().union(*tables)  # a run with few events may lack some
        bins = sorted(every_bin, key=lambda name: float(name.split()[0]))
        for i, (run, table) in enumerate(zip(runs, tables)):
            places = np.array([k for k, name in enumerate(bins) if name in table])
            rows = [table[bins[k]] for k in places]
            heights, bars = (np.array([row[name] for row in rows], float) * scale  # NaN where unknown
                             for name in (statistic, f"{statistic}_error"))
            axis.errorbar(places + 0.06 * i, heights, bars, marker="o", capsize=3, **style(i))
        if f"line_fit_{statistic}" in task.baselines:
            places = [k for k, name in enumerate(bins) if name in tables[0]]
            heights = np.array([tables[0][bins[k]][f"line_fit_{statistic}"] for k in places], float)
            axis.plot(places, heights * scale, color="0.55", marker="s")
        counts = [next(table[name]["n"] for table in tables if name in table) for name in bins]
        names = [name.replace(" to ", "\nto ").replace(" or ", "\nor ") for name in bins]
        axis.set_xticks(range(len(bins)), fontsize=7,
                        labels=[f"{name}\nn = {n:,}" for name, n in zip(names, counts)])
        axis.set(xlabel=kind if kind == "energy" else "pulses of the event", ylim=(0, None),
                 ylabel=task.drawn[statistic] + unit)
    left.set(xlabel=task.error + unit, ylabel=f"share of {evaluations[0]['n_events']:,} events",
             xlim=(edges[0], edges[-1]))
    left.legend()
    return figure


def calibration(config, runs, plt):
    figure, axis = plt.subplots(figsize=(5, 5), layout="constrained")
    axis.plot([0, 100], [0, 100], color="0.55", linewidth=1, label="right")
    for i, (run, found) in enumerate(zip(runs, read_evaluations(runs, config.split))):
        if "calibration" not in found:
            common.fail(f"{run} knows no uncertainty: train it with a direction_loss that holds vmf")
        level, inside = (100 * np.array(found["calibration"][name]) for name in ("level", "inside"))
        axis.plot(level, inside, marker="o", markersize=4, label=name_of(run), **style(i))
    axis.set(xlabel="predicted probability of a contour [%]", ylabel="events inside it [%]", xlim=(0, 100),
             ylim=(0, 100))
    axis.set_aspect("equal")
    axis.text(97, 4, "below the line: too sure of itself", ha="right", fontsize=8, color="0.4")
    axis.legend()
    return figure


def labels(config, runs, plt):
    """The error against the number of labels, a line for each way to begin: pretrained, frozen, from scratch.

    Several runs of one kind and size: their mean and spread. A single run: the error by the choice of its
    validation events.
    """
    groups, evaluations = {}, read_evaluations(runs, config.split)
    task, scale, unit = task_of(runs, evaluations)
    name = list(task.drawn)[-1]
    for found in evaluations:
        frozen = "pretrained, frozen" if found["freeze_backbone"] else "pretrained"
        whole = found["rows"][0]
        point = np.array([whole[name], whole[f"{name}_error"]], float) * scale  # NaN where unknown
        groups.setdefault(frozen if found["pretrained"] else "from scratch", {}).setdefault(
            found["n_train"], []).append(point)
    figure, axis = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for i, (kind, sizes) in enumerate(sorted(groups.items())):
        n = sorted(sizes)
        points = [np.array(sizes[k]).T for k in n]  # (2, runs): value, its own error
        bars = [spread(value) if len(value) > 1 else own[0] for value, own in points]
        axis.errorbar(n, [value.mean() for value, _ in points], bars, label=kind, marker="o", capsize=3,
                      **style(i))
    axis.set(xlabel="labelled events", ylabel=task.drawn[name] + unit)
    plain_log(axis.xaxis, sorted({n for sizes in groups.values() for n in sizes}))
    axis.legend()
    return figure


def scaling(config, runs, plt):
    """The last value of a column of log.csv against events seen or parameters."""
    points = []
    for run in runs:
        log = read_log(run)
        if config.y not in log or np.isnan(log[config.y]).all():
            known = ", ".join(name for name in log if name.startswith("val_"))
            common.fail(f"{run}/log.csv has no {config.y}; it has {known}")
        last = np.flatnonzero(~np.isnan(log[config.y]))[-1]
        x = log["events"][last]
        if config.x == "parameters":
            x = common.count_parameters(common.load_checkpoint(Path(run) / "ckpt.pt")["model"])
        points.append((x, log[config.y][last], name_of(run)))
    x, y, names = zip(*sorted(points))
    figure, axis = plt.subplots(figsize=(7, 4.5), layout="constrained")
    axis.plot(x, y, "o", color=COLORS[0])
    axis.set(xlabel={"events": "events seen", "parameters": "parameters"}[config.x],
             ylabel=AXES.get(config.y, config.y))
    if config.fit and len(set(x)) > 2:
        axis.set_title(draw_power_law(axis, np.array(x), np.array(y), config.floor, color="0.55"))
    plain_log(axis.xaxis, sorted(set(x)) if len(set(x)) < 8 else ())
    plain_log(axis.yaxis)
    axis.margins(0.15, 0.15)
    write_names(axis, zip(zip(x, y), names, ["0.35"] * len(x)))
    return figure


def write_names(axis, points, va="center"):
    """Write names right of points, (place, name, colour) each; one that would cover another moves up."""
    axis.figure.canvas.draw()
    taken = []  # places of names [points of print]
    for (x, y), (place, name, color) in sorted(
            ((axis.transData.transform(point[0]) * 72 / axis.figure.dpi, point) for point in points),
            key=lambda item: item[0][1]):
        up = 0
        while any(abs(x - other[0]) < 90 and abs(y + up - other[1]) < 11 for other in taken):
            up += 1
        taken.append((x, y + up))
        axis.annotate(name, place, (8, up), textcoords="offset points", va=va, fontsize=9, color=color,
                      annotation_clip=False,
                      bbox={"facecolor": "white", "alpha": 0.8, "pad": 1, "linewidth": 0})  # over a line


def fit_power_law(xs, y, floor):
    """Least squares for log (y - floor) over log xs -> factor, exponents, errors of these by scatter.

    xs: one array (number of points,) for each variable; y (number of points,).
    """
    if min(y) <= floor:
        common.fail(f"floor = {floor:g}: must be below {min(y):.4g}, the smallest value drawn")
    if np.min(xs) <= 0:
        common.fail("fit = True: a power law needs numbers above 0")
    u, v = np.column_stack([np.ones(len(y)), *np.log(xs)]), np.log(y - floor)
    best, *_ = np.linalg.lstsq(u, v, rcond=None)
    scatter = np.square(v - u @ best).sum() / (len(y) - len(best))
    errors = np.diag(scatter * np.linalg.inv(u.T @ u)) ** 0.5
    return np.exp(best[0]), best[1:], errors[1:]


def draw_power_law(axis, x, y, floor, **line):
    """Fit a power law and draw it -> its exponent, as text."""
    factor, (slope,), (error,) = fit_power_law([x], y, floor)
    grid = np.geomspace(min(x), max(x))
    axis.plot(grid, floor + factor * grid**slope, linewidth=1, **line)
    return f"power {slope:.3f} $\\pm$ {error:.3f}" + (f" above {floor:g}" if floor else "")


def points_of_study(config, results, name):
    """What is drawn of one study: yields the name of a line, x, and the row of results with y."""
    final = final_rows(results, name)
    if not final:
        known = ", ".join(sorted({row["study"] for row in results})) or "none"
        common.fail(f"{config.results} has no study {name}; it has {known}")
    for arm in dict.fromkeys(arm for arm, _, _ in final):
        best, (line, _, number) = best_rate(final, arm), arm.rpartition("/")
        runs = [row for (other, rate, _), row in final.items() if other == arm and rate == best]
        if config.x == "learning_rate":
            yield from ((arm, rate, row) for (other, rate, _), row in final.items() if other == arm)
        elif config.x == "parameters":
            yield from ((line or name, number_in(row, "parameters"), row) for row in runs)
        elif config.x == "number":
            if not is_numbered(arm):
                common.fail(f"{config.results}: arm {arm} of {name} has no number in its name; choose "
                            "another --x=")
            yield from ((line, float(number), row) for row in runs)
        else:
            scale = 1
            if config.x == "seconds":
                scale = np.nanmean([1 / number_in(row, "events_per_s") for row in runs])
            rows = [row for row in results
                    if (row["study"], row["arm"], float(row["learning_rate"])) == (name, arm, best)]
            if is_numbered(arm) and len({row["step"] for row in rows}) == 1:
                arm = line  # arms of several lengths, a point each, share a line
            yield from ((arm, number_in(row, "events") * scale, row) for row in rows)


def smallest_gap(points):
    """Between the heights of points as write_names takes them: how well their names can be told apart."""
    return np.diff(np.sort([height for (_, height), *_ in points])).min()


def is_numbered(arm):
    """pretrained/500: yes."""
    line, _, number = arm.rpartition("/")
    return bool(line) and number.replace(".", "", 1).isdigit()


def study(config, runs, plt):
    """Results of tools.study, mean and standard deviation over seeds. What diverged is named, not drawn.

    x = learning_rate: one line per arm; of arms with a number (muP/64), colour tells the number and dashes
    the name. Arms of several studies that config.arms names alike are one line. x = number (pretrained/500)
    or parameters: the best learning rate of each arm, one line for arms that share what stands before the
    number. x = events or seconds: the course of runs with the best one.
    """
    results, lines = read_results(config.results), {}  # name of a line -> x -> values, one per seed
    sizes = []  # of all runs drawn: parameters, x, y
    names = [name.strip() for name in config.study.split(",")]
    for name in names:
        for line, x, row in points_of_study(config, results, name):
            if config.arms and line not in config.arms:
                continue
            line = config.arms.get(line, line)
            if row["step"] == "0":
                print(f"note: {name}, arm {row['arm']}, learning rate {row['learning_rate']}, seed "
                      f"{row['seed']} diverged, it is not drawn")
            elif row[config.y]:
                if len(names) > 1 and line != name and not config.arms:
                    line = f"{name}: {line}"
                lines.setdefault(line, {}).setdefault(x, []).append(number_in(row, config.y))
                sizes.append((float(row["parameters"] or 0), x, number_in(row, config.y)))
    if not lines:
        common.fail(f"{config.results}: {config.y} is empty in {config.study}")
    styles = [style(i) for i in range(len(lines))]
    if config.x == "learning_rate" and all(map(is_numbered, lines)):
        kinds = sorted({line.rpartition("/")[0] for line in lines}, reverse=True)
        numbers = sorted({float(line.rpartition("/")[2]) for line in lines})
        lines = dict(sorted(lines.items(), key=lambda item: (item[0].rpartition("/")[0] != kinds[0],
                                                             float(item[0].rpartition("/")[2]))))
        styles = [style(numbers.index(float(line.rpartition("/")[2])), kinds.index(line.rpartition("/")[0]))
                  for line in lines]
    figure, axis = plt.subplots(figsize=(9 if config.fit else 7, 4.5), layout="constrained")
    starts, ends = [], []  # of the lines: place, name, colour
    for (line, points), line_style in zip(lines.items(), styles):
        x = np.array(sorted(points))
        mean, bar = np.array([(np.mean(points[k]), spread(points[k])) for k in x]).T
        axis.errorbar(x, mean, bar, label=line, marker="o", markersize=4, capsize=3, **line_style)
        name = line
        if config.fit and len(x) > 2:  # of all runs, not of their means: the slope's error knows the spread
            runs_of_line = np.array([(k, y) for k in x for y in points[k]])
            power = draw_power_law(axis, *runs_of_line.T, config.floor, color=line_style["color"], alpha=0.5)
            name = f"{line}: {power}"
        starts.append(((x[0], mean[0]), name, line_style["color"]))
        ends.append(((x[-1], mean[-1]), name, line_style["color"]))
    axis.set(xlabel=config.x_label or AXES.get(config.x, config.x), ylabel=AXES.get(config.y, config.y))
    xs = sorted(set().union(*lines.values()))
    if config.x != "seconds" and xs[0] > 0:
        plain_log(axis.xaxis, xs if len(xs) < 8 else ())
    if config.fit:
        plain_log(axis.yaxis)
        parameters, x, y = np.array(sizes).T
        n_sizes, n_xs, n_both = len(set(parameters)), len(set(x)), len(set(zip(parameters, x)))
        is_crossed = n_both > max(n_sizes, n_xs) and min(n_sizes, n_xs) > 2 and all(parameters)
        if config.x == "number" and is_crossed:
            _, (a, b), (a_error, b_error) = fit_power_law([parameters, x], y, config.floor)
            print(f"one law for {len(y)} runs of {len(lines)} lines: parameters to the power {a:.3f} +- "
                  f"{a_error:.3f}, {config.x_label or 'number'} {b:.3f} +- {b_error:.3f}")
    axis.margins(y=0.08)  # a baseline may be the lowest
    for name, height in config.baselines.items():
        axis.axhline(height, color="0.55", linewidth=1, linestyle="--")
        axis.annotate(name, (0, height), xycoords=("axes fraction", "data"), xytext=(4, 2),
                      textcoords="offset points", fontsize=8, color="0.4")
    if config.x == "learning_rate":
        axis.legend()
    elif config.fit or len(lines) > 1 and smallest_gap(starts) <= smallest_gap(ends):
        write_names(axis, ends)
    elif len(lines) > 1:
        write_names(axis, starts, va="bottom")
    return figure


# ------------------------------------------------------------------------------------------------------------
# one event
# ------------------------------------------------------------------------------------------------------------

def event(config, runs, plt):
    """The detector in 3-D, the pulses of one event, and what the models make of it."""
    import torch
    from evaluate import load_model
    split, geometry = data.open_split(config.data_dir, config.split), data.read_geometry(config.data_dir)
    if config.event >= len(split):
        common.fail(f"{split.path} holds {len(split):,} events, numbered from 0: there is no event "
                    f"{config.event}")
    events, pulses = data.read_events(split, np.array([config.event]))
    truth, place = events[0], geometry["position"][pulses["dom"]]
    good = ~pulses["aux"] if not pulses["aux"].all() else np.ones(len(pulses), bool)
    center = place[good].mean(0)
    hidden = (data.uniform_hash(0, 0, data.pulse_places(events)) < config.hide) & ~pulses["aux"]

    figure = plt.figure(figsize=(8.5, 7.5), layout="constrained")
    axis = figure.add_subplot(projection="3d")
    draw_detector(axis, geometry)
    reach = 1.05 * np.abs(geometry["position"]).max()  # [m] the detector stands around 0
    shown = draw_pulses(axis, pulses, place, good)
    figure.colorbar(shown, ax=axis, shrink=0.6, pad=0.04, label="time [ns]")
    axis.view_init(elev=12, azim=-60)
    true = None
    if not np.isnan(truth["azimuth"]):
        true = unit_vector(*torch.tensor([float(truth["azimuth"]), float(truth["zenith"])]))
        draw_direction(axis, center, 0.75 * reach * true.numpy(), COLORS[1], "true direction (dot: source)")
        axis.view_init(elev=12, azim=np.degrees(truth["azimuth"]) + 90)  # from the side of the flight
    for run in runs:
        model, run_config, _ = load_model(f"{run}/best.pt", config.data_dir)
        batch, = data.micro_batches(events, pulses, 1, hidden=hidden)
        with torch.no_grad():
            if not hasattr(run_config, "task"):
                if hidden.any():
                    guesses = model.predict(batch)[0].topk(3).indices.T.numpy()  # (3, M), the best first
                    draw_guesses(axis, pulses["dom"][hidden], guesses, geometry["position"])
            elif run_config.task == "direction":
                batch.pop("hidden")  # this model sees all DOMs
                found = model(batch)["direction"][0]
                label = name_of(run)
                if true is not None:
                    label += f", off by {np.degrees(angular_error(found, true).item()):.0f} deg"
                draw_direction(axis, center, 0.75 * reach * found.numpy(), COLORS[0], label, linestyle="--")
    title = f"event {truth['event_id']}: {truth['n_pulses']:,} pulses, {truth['total_charge']:.0f} p.e."
    axis.set(xlabel="x [m]", ylabel="y [m]", zlabel="z [m]", title=title)
    axis.locator_params(nbins=3)
    axis.grid(False)
    axis.set_box_aspect((1, 1, 1), zoom=1.1)
    for limits in (axis.set_xlim, axis.set_ylim, axis.set_zlim):
        limits(-reach, reach)
    axis.legend(loc="upper left", fontsize=8)
    return figure


def draw_detector(axis, geometry):
    """A thin line for each string, from its top DOM to its lowest."""
    for string in np.unique(geometry["string"]):
        doms = geometry["position"][geometry["string"] == string]
        axis.plot(*doms[[doms[:, 2].argmax(), doms[:, 2].argmin()]].T, color="0.9", linewidth=0.6, zorder=0)


def draw_pulses(axis, pulses, place, good):
    """Good pulses as dots, coloured by time and sized by charge, others as crosses -> the dots."""
    size = 14 * (1 + np.log10(np.maximum(pulses["charge"], 0.1) / 0.1)) ** 1.5
    aux = pulses["aux"]
    axis.scatter(*place[aux].T, c="0.35", s=12, marker="x", linewidths=0.7, label="aux (mostly noise)")
    early, late = np.percentile(pulses["time"][good], (2, 98))  # a few stray ones would stretch the scale
    return axis.scatter(*place[~aux].T, c=pulses["time"][~aux], s=size[~aux], cmap="plasma", alpha=0.9,
                        linewidths=0, vmin=early, vmax=max(late, early + 1))


def draw_direction(axis, center, towards, color, label, **line):
    """A line through the middle of the pulses, with a dot at the end where the neutrino came from."""
    ends = np.stack([center - towards, center + towards])  # towards (3,) [m]
    axis.plot(*ends.T, linewidth=2, color=color, label=label, **line)
    axis.plot(*(center + towards)[:, None], marker="o", markersize=6, color=color)


def draw_guesses(axis, doms, guesses, position):
    """Circles around hidden DOMs (M,), crosses at the model's guesses (3, M), a line to the best of them."""
    for a, b in zip(position[doms], position[guesses[0]]):
        axis.plot(*np.stack([a, b]).T, color=COLORS[2], linewidth=0.8)
    axis.scatter(*position[doms].T, s=90, facecolors="none", edgecolors=COLORS[2], linewidths=1.5,
                 label="hidden DOM")
    labels = (f"best guess ({(guesses[0] == doms).sum()} of {len(doms)} right)", "second, third", None)
    for guess, alpha, label in zip(guesses, (1, 0.6, 0.4), labels):
        axis.scatter(*position[guess].T, marker="+", s=70, color=COLORS[2], alpha=alpha, label=label)


PLOTS = {plot.__name__: plot for plot in (curves, errors, calibration, labels, scaling, study, event)}


def main():
    config = knobs.load_config(PlotConfig, __doc__)
    import matplotlib
    matplotlib.use("Agg")  # no window is needed
    import matplotlib.pyplot as plt
    plt.rcParams.update({"axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
                         "axes.axisbelow": True, "grid.color": "0.92", "legend.frameon": False,
                         "font.size": 10})
    figure = PLOTS[config.what](config, [run.strip() for run in config.runs.split(",") if run.strip()], plt)
    path = config.out or f"out/{config.what}.png"
    common.write_atomic(path, lambda part: figure.savefig(part, format="png", dpi=150))
    print(path)


if __name__ == "__main__":
    common.run_stage(main)
