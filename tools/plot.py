"""Draw runs, one event, or a sweep. Needs matplotlib: pip install
matplotlib.

    python -m tools.plot --what=curves --runs=out/demo,out/demo+gru
    python -m tools.plot --what=event --event=2644 --runs=out/demo,out/demo_finetune
    python -m tools.plot --what=sweep --results=out/sweep_labels/results.csv

Writes out/<what>.png in seconds. An event is drawn with the guesses of a
pretraining run for masked DOMs, and with the direction that a fine-tuning
run finds. A sweep is drawn as mean and standard deviation over seeds.
"""
import utils  # first: it sets how torch's threads wait

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F

import data
from evaluate import load_model
from model import angular_error, unit_vector
from tools.sweep import number, read_csv, reported, select

# Okabe & Ito: all eyes can distinguish them
COLORS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]

@dataclass
class PlotConfig:
    what: Literal["curves", "event", "sweep"] = "curves"  # what to draw
    runs: str = ""  # curves, event: folders of runs, separated by commas
    data_dir: str = "data/demo"  # event: data folder
    split: str = "val"  # event: the split it is in
    event: int = 0  # event: its place in the split
    mask_prob: float = 0.25  # event: share of the HLC pulses that is masked
    results: str = ""  # sweep: results.csv
    x: Literal["number", "learning_rate"] = "number"  # sweep: number in variant/number
    y: str = ""  # column to draw; "" = the loss, or the sweep's metric
    x_label: str = ""  # text; "" = x
    y_label: str = ""  # text; "" = y
    out: str = ""  # .png to write; "" = out/<what>.png

# ---- curves -------------------------------------------------------------------------------------

def read_log(run):
    """Read log.csv of a run -> {column: float array}, NaN where a cell is empty."""
    rows = read_csv(f"{run}/log.csv")
    if not rows:
        utils.fail(f"{run}/log.csv: no rows; runs are folders of train.py or finetune.py")
    return {name: np.array([float(row[name] or "nan") for row in rows]) for name in rows[0]}

def draw_column(axis, log, column, *args, **kwargs):
    if column in log:
        measured = ~np.isnan(log[column])
        axis.plot(log["step"][measured], log[column][measured], *args, **kwargs)

def draw_curves(config, runs):
    """Draw training as a line, evaluations as dots, the learning rate below."""
    if not runs:
        utils.fail("runs is empty; name folders of runs, separated by commas")
    logs = [read_log(run) for run in runs]
    is_pretraining = all("dom_loss" in log for log in logs)
    y = config.y or ("dom_loss" if is_pretraining else "loss")
    figure, (above, below) = plt.subplots(2, figsize=(7, 6), sharex=True, height_ratios=(3, 1))
    for i, (run, log) in enumerate(zip(runs, logs)):
        color = COLORS[i % len(COLORS)]
        draw_column(above, log, y, color=color, linewidth=1, alpha=0.6, label=Path(run).name)
        draw_column(above, log, f"val_{y}", "o", color=color, markersize=5)
        draw_column(below, log, "lr", color=color)
    if y == "dom_loss":
        weights = utils.load_checkpoint(f"{runs[0]}/ckpt.pt")["model"]
        n_doms = len(weights["encoder.embedding.geometry"])
        label = f"a random guess, ln {n_doms}"
        above.axhline(np.log(n_doms), color="0.55", linewidth=1, linestyle="--", label=label)
    above.set(ylabel=config.y_label or f"{y} (line: training, dots: validation)")
    below.set(xlabel="step", ylabel="learning rate", ylim=(0, None))
    above.legend()
    return figure

# ---- sweep --------------------------------------------------------------------------------------

def sweep_lines(rows, x, y):
    """Return {line: {x: values over seeds}}, {place on the x axis: name of the variant}.

    Variants a/500 and a/2000 are the line a. Without numbers each has a place of its own.
    """
    lines, names = {}, {}
    variants = list(dict.fromkeys(row["variant"] for row in rows))
    is_numbered = all(name.rpartition("/")[2].isdigit() for name in variants)
    for place, variant in enumerate(variants):
        line, _, at = variant.rpartition("/")
        if x == "learning_rate":
            line, runs = variant, select(rows, variant, "tune")
        else:
            runs = reported(rows, variant, rows[-1]["metric"])
            if not is_numbered:
                line, at, names[place] = "", place, variant
        for row in runs:
            at = row["learning_rate"] if x == "learning_rate" else at
            lines.setdefault(line, {}).setdefault(float(at), []).append(number(row, y))
    return lines, names

def draw_sweep(config, runs):
    """Draw mean and standard deviation over seeds; not if one of them diverged."""
    rows = read_csv(config.results)
    if not rows:
        utils.fail(f"{config.results}: no rows; results is a file of tools.sweep")
    y = config.y or rows[-1]["metric"]
    lines, names = sweep_lines(rows, config.x, y)
    figure, axis = plt.subplots(figsize=(7, 4.5))
    for i, (line, points) in enumerate(lines.items()):
        x = sorted(points)
        values = [points[k] if np.isfinite(points[k]).all() else [np.nan] for k in x]
        mean = [np.mean(seeds) for seeds in values]
        spread = [np.std(seeds, ddof=1) if len(seeds) > 1 else np.nan for seeds in values]
        axis.errorbar(x, mean, spread, marker="o", capsize=3, color=COLORS[i % len(COLORS)],
                      linestyle="none" if names else "-", label=line or None)
    xs = sorted(set().union(*lines.values()))
    if not names:
        axis.set_xscale("log")
        axis.legend()
    axis.set_xticks(xs, labels=[names.get(x, f"{x:,g}") for x in xs])
    axis.minorticks_off()
    x_label = config.x_label or ("" if names else config.x)
    axis.set(xlabel=x_label, ylabel=config.y_label or y)
    return figure

# ---- one event ----------------------------------------------------------------------------------

@torch.no_grad()
def draw_event(config, runs):
    """Draw the detector in 3-D, the pulses of one event, and what the models make of it."""
    split = data.open_split(config.data_dir, config.split)
    _, geometry = data.read_folder(config.data_dir)
    events, pulses = data.read_events(split, np.array([config.event]))
    event, aux = events[0], pulses["aux"]
    place = geometry["position"][pulses["dom"]]  # (P, 3) [m]
    center = place[aux == aux.min()].mean(0)  # of the HLC pulses, if any
    epoch = np.zeros(1, np.int64)
    mask = data.draw_mask(events, pulses, epoch, config.mask_prob, seed=0)

    figure = plt.figure(figsize=(8.5, 7.5))
    axis = figure.add_subplot(projection="3d")
    draw_detector(axis, geometry)
    shown = draw_pulses(axis, pulses, place)
    figure.colorbar(shown, ax=axis, shrink=0.6, pad=0.04, label="time [ns]")
    axis.view_init(elev=12, azim=-60)
    reach = 1.05 * np.abs(geometry["position"]).max()  # [m]
    truth = None
    if np.isfinite(event["azimuth"]):
        azimuth, zenith = event["azimuth"], event["zenith"]
        truth = unit_vector(torch.tensor(azimuth), torch.tensor(zenith))
        draw_direction(axis, center, 0.75 * reach * truth.numpy(),
                       "true direction (dot: source)", color=COLORS[1])
        axis.view_init(elev=12, azim=np.degrees(azimuth) + 90)  # from the side
    for run in runs:
        model, options, _ = load_model(f"{run}/best.pt", config.data_dir)
        if not hasattr(options, "task"):
            batch, = data.micro_batches(events, pulses, 1, mask=mask)
            logits, _ = model.predict(batch)  # (M, V)
            guesses = logits.topk(3).indices.T.numpy()
            draw_guesses(axis, pulses["dom"][mask], guesses, geometry["position"])
        elif options.task == "direction":
            batch, = data.micro_batches(events, pulses, 1)
            direction, label = F.normalize(model(batch)[0], dim=0), Path(run).name
            if truth is not None:
                error = np.degrees(angular_error(direction, truth).item())
                label += f", off by {error:.0f} deg"
            draw_direction(axis, center, 0.75 * reach * direction.numpy(), label,
                           color=COLORS[0], linestyle="--")
    axis.set(xlabel="x [m]", ylabel="y [m]", zlabel="z [m]", xlim=(-reach, reach),
             ylim=(-reach, reach), zlim=(-reach, reach))
    axis.set_title(f"event {event['event_id']}: {event['n_pulses']:,} pulses, "
                   f"{event['total_charge']:.0f} p.e.")
    axis.locator_params(nbins=3)
    axis.grid(False)
    axis.set_box_aspect((1, 1, 1), zoom=1.1)
    axis.legend(loc="upper left", fontsize=8)
    return figure

def draw_detector(axis, geometry):
    """Draw a thin line for each string, from its highest DOM to its lowest."""
    for string in np.unique(geometry["string"]):
        doms = geometry["position"][geometry["string"] == string]
        ends = doms[[doms[:, 2].argmax(), doms[:, 2].argmin()]]
        axis.plot(*ends.T, color="0.9", linewidth=0.6, zorder=0)

def draw_pulses(axis, pulses, place):
    """Draw HLC pulses as dots, coloured by time, others as crosses -> the dots."""
    aux, time = pulses["aux"], pulses["time"]
    size = 14 * (1 + np.log10(np.maximum(pulses["charge"], 0.1) / 0.1)) ** 1.5
    axis.scatter(*place[aux].T, c="0.35", s=12, marker="x", linewidths=0.7, label="aux")
    # a few stray pulses would stretch the scale
    early, late = np.percentile(time[aux == aux.min()], (2, 98))
    return axis.scatter(*place[~aux].T, c=time[~aux], s=size[~aux], cmap="plasma", alpha=0.9,
                        linewidths=0, vmin=early, vmax=max(late, early + 1))

def draw_direction(axis, center, towards, label, **kwargs):
    """Draw a line through the middle of the pulses, with a dot at the end of the source."""
    ends = np.stack([center - towards, center + towards])  # towards (3,) [m]
    axis.plot(*ends.T, linewidth=2, label=label, **kwargs)
    axis.plot(*ends[1:].T, marker="o", markersize=6, color=kwargs["color"])

def draw_guesses(axis, doms, guesses, position):
    """Circle masked DOMs (M,), draw guesses (3, M), and a line to the best ones."""
    color = COLORS[2]
    for ends in zip(position[doms], position[guesses[0]]):
        axis.plot(*np.stack(ends).T, color=color, linewidth=0.8)
    axis.scatter(*position[doms].T, s=90, facecolors="none", edgecolors=color, linewidths=1.5,
                 label="masked DOM")
    n_right = (guesses[0] == doms).sum()
    labels = f"best guess ({n_right} of {len(doms)} right)", "second, third", None
    for guess, alpha, label in zip(guesses, (1, 0.6, 0.4), labels):
        axis.scatter(*position[guess].T, marker="+", s=70, color=color, alpha=alpha, label=label)

def main():
    config = utils.load_config(PlotConfig, __doc__)
    matplotlib.use("Agg")  # no window is needed
    plt.rcParams.update({"axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
                         "axes.axisbelow": True, "grid.color": "0.92", "legend.frameon": False,
                         "figure.constrained_layout.use": True})
    draw = {"curves": draw_curves, "event": draw_event, "sweep": draw_sweep}[config.what]
    figure = draw(config, [run.strip() for run in config.runs.split(",") if run.strip()])
    path = config.out or f"out/{config.what}.png"
    utils.write_atomic(path, lambda part: figure.savefig(part, format="png", dpi=150))
    print(f"written {path}")

if __name__ == "__main__":
    utils.run_main(main)
