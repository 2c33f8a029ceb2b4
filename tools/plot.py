"""Draw runs, one event, or a sweep to out/<what>.png. Needs: pip install matplotlib.

    python -m tools.plot --what=curves --runs=out/demo,out/demo+gru
    python -m tools.plot --what=event --event=69 --runs=out/demo,out/demo_finetune
    python -m tools.plot --what=sweep --results=out/sweep_labels/results.csv
"""
import utils  # before torch

from dataclasses import dataclass
from itertools import cycle
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
from tools.sweep import read_csv, reported, values_of

# Okabe & Ito: all eyes can distinguish them
COLORS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"]

@dataclass
class PlotConfig:
    what: Literal["curves", "event", "sweep"] = "curves"  # what to draw
    runs: str = "out/demo"  # curves, event: folders, separated by commas
    data_dir: str = "data/demo"  # event: data folder
    split: str = "val"  # event: the split it is in
    event: int = 0  # event: its place in the split
    results: str = ""  # sweep: results.csv
    x: Literal["number", "learning_rate"] = "number"  # sweep: number in variant/number
    y: str = ""  # column to draw; "" = the loss, or the metric
    lines: str = ""  # sweep: only these
    level: float = 0.0  # sweep: the line fit's
    out: str = ""  # .png to write; "" = out/<what>.png

def read_log(run):
    """Read log.csv -> {column: float array}, NaN where a cell is empty."""
    rows = read_csv(f"{run}/log.csv")
    if not rows:
        utils.fail(f"{run}/log.csv: no rows; is it the folder of a run?")
    return {name: np.array([float(row[name] or "nan") for row in rows]) for name in rows[0]}

def draw_curves(config, runs):
    """Draw training, evaluations, learning rate."""
    logs = [read_log(run) for run in runs]
    y = config.y or ("dom_loss" if all("dom_loss" in log for log in logs) else "loss")
    figure, (above, below) = plt.subplots(2, sharex=True, height_ratios=(3, 1))
    for color, run, log in zip(cycle(COLORS), runs, logs):
        for axis, column, style in ((above, y, "-"), (above, f"val_{y}", "o"),
                                    (above, f"val_string_{y}", "s"), (below, "lr", "-")):
            if column in log:
                there = np.isfinite(log[column])
                axis.plot(log["step"][there], log[column][there], style, color=color,
                          label=Path(run).name if column == y else None)
    if y == "dom_loss":
        weights = utils.load_checkpoint(f"{runs[0]}/ckpt.pt")["model"]
        n_doms = len(weights["encoder.embedding.geometry"])
        above.axhline(np.log(n_doms), color="0.55", linestyle="--",
                      label=f"a random guess, ln {n_doms}")
    above.set(ylabel=f"{y} (line: training, dots: validation, squares: of strings)")
    below.set(xlabel="step", ylabel="learning rate", ylim=(0, None))
    above.legend()
    return figure

def sweep_lines(rows, x, y):
    """Return {line: {x: values over seeds}}, {place: variant}."""
    lines, names = {}, {}
    variants = [*dict.fromkeys(row["variant"] for row in rows)]
    is_numbered = all(name.rpartition("/")[2].isdigit() for name in variants)
    for place, variant in enumerate(variants):
        line, _, at = variant.rpartition("/")
        if x == "learning_rate":
            values = values_of(rows, variant, "tune", y)
            lines[variant] = {float(rate): values[rate] for rate in values}
            continue
        if not is_numbered:
            line, at, names[place] = "", place, variant
        _, values = reported(rows, variant, rows[-1]["metric"], y)
        lines.setdefault(line, {})[float(at)] = values
    return lines, names

def draw_sweep(config, runs):
    """Draw means over seeds; not if one diverged."""
    rows = read_csv(config.results)
    if not rows:
        utils.fail(f"{config.results}: no rows; is it of tools.sweep?")
    lines, names = sweep_lines(rows, config.x, y := config.y or rows[-1]["metric"])
    lines = {name: lines[name] for name in config.lines.split(",") if name} or lines
    figure, axis = plt.subplots(figsize=(7, 4.5))
    for color, (line, points) in zip(cycle(COLORS), lines.items()):
        x = [at for at in sorted(points) if np.isfinite(points[at] or np.nan).all()]
        mean = [np.mean(points[at]) for at in x]
        spread = [np.std(points[at], ddof=1) if len(points[at]) > 1 else np.nan for at in x]
        axis.errorbar(x, mean, spread, marker="o", capsize=3, color=color,
                      linestyle="none" if names else "-", label=line)
    if not names:
        axis.set_xscale("log")
        axis.legend()
    x = sorted(set().union(*lines.values()))
    if config.level:
        axis.axhline(config.level, color="0.55", linestyle="--")
        axis.text(x[-1], config.level, "line fit", ha="right", va="bottom", color="0.4")
    axis.set_xticks(x, labels=[names.get(at, f"{at:,g}") for at in x])
    axis.minorticks_off()
    axis.set(xlabel="" if names else config.x.replace("number", "labels"), ymargin=0.1,
             ylabel=y.replace("val_angle_mean", "mean angle [rad]"))
    return figure

@torch.no_grad()
def draw_event(config, runs):
    """Draw an event, and what models make of it."""
    split = data.open_split(config.data_dir, config.split)
    if config.event >= len(split.events):
        utils.fail(f"event = {config.event}: there are {len(split.events)}")
    events, pulses = data.read_events(split, np.array([config.event]))
    event, aux, position = events[0], pulses["aux"], split.geometry["position"]
    place = position[pulses["dom"]]  # (P, 3) [m]
    center = place[aux == aux.min()].mean(0)  # of the HLC pulses, if any
    reach = 1.05 * np.abs(position).max()  # [m]
    strings = split.geometry["string"]
    figure, axis = plt.subplots(figsize=(8.5, 7.5), subplot_kw={"projection": "3d"})
    for string in np.unique(strings):  # from its highest DOM to its lowest
        doms = position[strings == string]
        ends = doms[[doms[:, 2].argmax(), doms[:, 2].argmin()]]
        axis.plot(*ends.T, color="0.9", linewidth=0.6, zorder=0)
    figure.colorbar(draw_pulses(axis, pulses, place), ax=axis, shrink=0.6, label="time [ns]")
    azimuth, zenith = event["azimuth"], event["zenith"]
    truth = unit_vector(torch.tensor(azimuth), torch.tensor(zenith))
    has_truth = np.isfinite(azimuth)
    axis.view_init(elev=12, azim=np.nan_to_num(np.degrees(azimuth)) + 90)
    if has_truth:
        draw_direction(axis, center, 0.75 * reach * truth, "truth (dot: source)", color=COLORS[1])
    for run in runs:
        path = run if str(run).endswith(".pt") else f"{run}/best.pt"
        model, options, _ = load_model(path, config.data_dir)
        if not hasattr(options, "task"):
            mask = data.draw_mask(events, pulses, strings, 0 * events["start"], 0.25,
                                  getattr(options, "mask_unit", "pulse"), 0)
            batch, = data.micro_batches(events, pulses, 1, mask=mask)
            logits, _ = model.predict(batch)  # (M, V)
            draw_guesses(axis, pulses["dom"][mask], logits.argmax(-1).numpy(), split.geometry)
        elif options.task == "direction":
            batch, = data.micro_batches(events, pulses, 1)
            direction, label = F.normalize(model(batch)[0], dim=0), Path(run).stem
            if has_truth:
                error = np.degrees(angular_error(direction, truth).item())
                label += f", off by {error:.0f} deg"
            draw_direction(axis, center, 0.75 * reach * direction, label,
                           color=COLORS[0], linestyle="--")
    axis.set(xlabel="x [m]", ylabel="y [m]", zlabel="z [m]", xlim=(-reach, reach),
             ylim=(-reach, reach), zlim=(-reach, reach), box_aspect=(1, 1, 1))
    axis.set_title(f"event {config.event}: {len(pulses)} of {event['n_pulses']:,} pulses")
    axis.locator_params(nbins=3)
    axis.grid(False)
    axis.legend(loc="upper left", fontsize=8)
    return figure

def draw_pulses(axis, pulses, place):
    """Draw HLC pulses as dots, aux as crosses -> the dots."""
    aux, time = pulses["aux"], pulses["time"]
    size = 14 * (1 + np.log10(np.maximum(pulses["charge"], 0.1) / 0.1)) ** 1.5
    axis.scatter(*place[aux].T, c="0.35", s=12, marker="x", label="aux" if aux.any() else None)
    # a few stray pulses would stretch the scale
    early, late = np.percentile(time[aux == aux.min()], (2, 98))
    return axis.scatter(*place[~aux].T, c=time[~aux], s=size[~aux], cmap="plasma",
                        linewidths=0, vmin=early, vmax=max(late, early + 1))

def draw_direction(axis, center, towards, label, **kwargs):
    """Draw a line along towards (3,) [m], a dot at its end."""
    ends = np.stack([center - towards.numpy(), center + towards.numpy()])
    axis.plot(*ends.T, linewidth=2, label=label, **kwargs)
    axis.plot(*ends[1:].T, marker="o", color=kwargs["color"])

def draw_guesses(axis, dom, guess, geometry):
    """Circle masked DOMs (M,), join them to the guesses."""
    position, string = geometry["position"], geometry["string"]
    style = {"color": COLORS[2], "linewidth": 0.8}
    for ends in zip(position[dom], position[guess]):
        axis.plot(*np.stack(ends).T, **style)
    axis.plot(*position[dom].T, "o", **style, fillstyle="none", label="masked DOM")
    label = f"guess: {(string[guess] == string[dom]).sum()} of {len(dom)} strings right"
    axis.plot(*position[guess].T, "+", **style, label=label)

def main():
    config = utils.load_config(PlotConfig, __doc__)
    matplotlib.use("Agg")
    plt.rcParams.update({"axes.grid": True, "figure.constrained_layout.use": True})
    draw = {"curves": draw_curves, "event": draw_event, "sweep": draw_sweep}
    figure = draw[config.what](config, config.runs.split(","))
    path = config.out or f"out/{config.what}.png"
    utils.write_atomic(path, lambda part: figure.savefig(part, format="png", dpi=150))
    print(f"written {path}")

if __name__ == "__main__":
    utils.run_main(main)
