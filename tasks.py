"""What a model learns to tell: DOM_LOSSES and CLS_TARGETS in pretraining, TASKS in fine-tuning.

To add one, add an entry there. A target of [CLS] needs a weight too, the knob lambda_<name> of train.py; what
is not among the fields of data.EVENT needs one there, filled by prepare.pack, and data prepared anew. From an
entry of TASKS follow the head (Reconstructor in model.py), the knob `task`, labels, loss and columns of
log.csv (finetune.py), tables and files of predictions (evaluate.py), pictures (tools/plot.py) and studies.

B events of a batch, their M hidden pulses and the V DOMs are torch tensors, n events that are judged numpy
arrays; config is that of the run.
"""
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

POSITION_SCALE = 500.0  # [m] half of IceCube's height: its scaled positions lie in about -1..1


# ------------------------------------------------------------------------------------------------------------
# pretraining: which DOM was hit, and what [CLS] learns of the whole event
# ------------------------------------------------------------------------------------------------------------

def earth_movers_distance(logits, dom, event, geometry):
    """Mean distance of the predicted DOM from the true one, sum_j p_j |x_j - x_true| [100 m], (M,).

    So far has the predicted distribution to be carried: all of it goes to a single DOM, and no solver is
    needed.
    """
    exact = "donot_use_mm_for_euclid_dist"  # torch's name for: no rounding of small distances
    distance = torch.cdist(geometry[dom], geometry, compute_mode=exact) / 100  # (M, V)
    return (logits.softmax(-1) * distance).sum(-1)


def chamfer_distance(logits, dom, event, geometry):
    """From each hidden DOM to the nearest of its event's expected positions, and back [100 m], (M,).

    Expected position of a hidden pulse: sum_j p_j x_j. Which guess belongs to which pulse does not count: the
    mean over an event is the Chamfer distance of two sets of points.
    """
    if not len(dom):
        return logits.sum(-1)
    with torch.autocast(logits.device.type, enabled=False):  # bfloat16 is off by a metre
        expected, true = logits.softmax(-1) @ geometry, geometry[dom]  # (M, 3)
    distance = torch.cdist(true, expected, compute_mode="donot_use_mm_for_euclid_dist") / 100  # (M, M)
    distance = distance.masked_fill(event[:, None] != event, float("inf"))
    return distance.amin(1) + distance.amin(0)


# logits (M, V), true DOM and event of each hidden pulse (M,), where the DOMs are (V, 3) [m] -> (M,)
DOM_LOSSES = {"ce": lambda logits, dom, event, geometry: F.cross_entropy(logits, dom, reduction="none"),
              "emd": earth_movers_distance, "chamfer": chamfer_distance}


@dataclass(frozen=True)
class ClsTarget:
    """Something about the whole event that [CLS] learns to tell, from the data alone."""
    width: int  # numbers that tell it
    label: str  # field of data.EVENT that it comes from
    truth: Callable  # that field of a batch -> (B, width), numbers of order one
    metric: str  # column of log.csv that tells in units how good it is: val_<metric>
    measure: Callable  # prediction, truth (B, width) -> (B,)
    of_mean: Callable = math.sqrt  # mean of that over the events -> the number in the column
    loss: Callable = lambda x, truth: (x - truth).square().mean(-1)  # prediction, truth (B, width) -> (B,)
    is_known: Callable = lambda truth: truth[:, 0].isfinite()  # truth (B, width) -> bool (B,)

    def known_truth(self, batch):
        """-> truth (B, width), 0 where it is not known; whether it is known, bool (B,)."""
        truth = self.truth(batch[self.label])
        is_known = self.is_known(truth)
        return torch.where(is_known[:, None], truth, 0.0), is_known


CLS_TARGETS = {
    "charge": ClsTarget(  # log10 of the total charge; its metric in dex
        width=1, label="total_charge", truth=lambda charge: torch.log10(charge.clamp(min=1e-3))[:, None],
        metric="charge_rms", measure=lambda x, truth: (x - truth).square().sum(-1)),
    "center": ClsTarget(  # charge-weighted centre; its metric in m
        width=3, label="center", truth=lambda center: center / POSITION_SCALE,
        metric="center_rms", measure=lambda x, truth: ((x - truth) * POSITION_SCALE).square().sum(-1)),
    "motion": ClsTarget(  # a first guess of the source's direction, zeros where there is none; metric in rad
        width=3, label="motion", truth=lambda motion: motion, is_known=lambda truth: truth.any(-1),
        loss=lambda x, truth: vmf_loss(**direction_outputs(x), truth=truth),  # docs/studies.md, cls
        metric="motion_angle", measure=lambda x, truth: angular_error(F.normalize(x, dim=-1), truth),
        of_mean=float),
}


# ------------------------------------------------------------------------------------------------------------
# fine-tuning: what a task is
# ------------------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Task:
    """A statistic is a tuple: a function of scores of some events, and the names of these scores."""
    labels: tuple  # fields of data.EVENT that hold the truth
    width: int  # numbers that the head gives
    outputs: Callable  # these numbers (B, width) -> dict of what they mean, (B, ...)
    loss: Callable  # outputs, batch, config -> (B,)
    score: Callable  # arrays (outputs, line_fit, line_fit_speed), events, config -> dict of scores (n,)
    statistics: dict  # name -> statistic: how good the model is
    baselines: dict  # name -> statistic: how good one is without learning; line_fit_<name> is drawn
    log: dict  # column of log.csv -> name of a statistic
    result: str  # one line, from the statistics; {<name>_error} is " +- ...", or empty for too few events
    columns: Callable  # arrays, config -> dict of columns of a .parquet file of predictions
    csv: tuple  # those that a .csv file has
    unit: str  # of the score "error" and of the statistics
    error: str  # that score in words
    span: tuple  # of its histogram
    drawn: dict  # statistic -> its name in pictures: the first in bins, the last over the number of labels


# ------------------------------------------------------------------------------------------------------------
# direction
# ------------------------------------------------------------------------------------------------------------

def unit_vector(azimuth, zenith):
    """Angles [rad] of a direction (where the neutrino came from) -> unit vector (..., 3)."""
    return torch.stack([azimuth.cos() * zenith.sin(), azimuth.sin() * zenith.sin(), zenith.cos()], dim=-1)


def angular_error(direction, truth):
    """The angle [rad] between unit vectors (..., 3), with a gradient everywhere.

    # DIFF(upstream): arccos of the product, clipped at 1 - 1e-4: no gradient within 0.8 degrees
    """
    sine = (torch.linalg.cross(direction, truth).square().sum(-1) + 1e-12).sqrt()
    return torch.atan2(sine, (direction * truth).sum(-1))


def one_minus_cosine(direction, truth):
    """Of the angle between unit vectors (..., 3). 1 - their product would round small angles to 0."""
    return (direction - truth).square().sum(-1) / 2


def vmf_loss(direction, kappa, truth):
    """-ln of the von Mises-Fisher density kappa / (4 pi sinh kappa) exp(kappa cos) on the sphere [1/sr].

    sinh is split into exp(kappa), which joins the cosine, and 1 - exp(-2 kappa). So float32 is enough for
    kappa from 1e-3 to 1e6.
    """
    log_area = torch.log(-torch.expm1(-2 * kappa) / kappa)  # ln of 2 sinh(kappa) / (kappa exp(kappa))
    return kappa * one_minus_cosine(direction, truth) + log_area + 1.8378770664  # ln 2 pi


def vmf_quantile(direction, kappa, truth):
    """The probability inside that contour around the prediction that goes through the truth.

    It is uniform in 0..1 if kappa is right.
    """
    return torch.expm1(-kappa * one_minus_cosine(direction, truth)) / torch.expm1(-2 * kappa)


# of the outputs (direction, kappa) and the true direction -> (B,)
DIRECTION_LOSSES = {"angular": lambda direction, kappa, truth: angular_error(direction, truth),  # upstream's
                    "cosine": lambda direction, kappa, truth: one_minus_cosine(direction, truth),
                    "vmf": vmf_loss}


def direction_outputs(x):
    """(B, 3) -> unit vectors towards the neutrino's source (B, 3), and how sure of it (B,), see vmf_loss."""
    kappa = (x.square().sum(-1) + 1e-6).sqrt()  # 0.001 or more: a vector of length 0 has a gradient too
    return {"direction": F.normalize(x, dim=-1), "kappa": kappa}


def direction_losses(outputs, batch, config):
    truth = unit_vector(batch["azimuth"], batch["zenith"])
    return sum(DIRECTION_LOSSES[name](outputs["direction"], outputs["kappa"], truth)
               for name in config.direction_loss.split("+"))


def direction_scores(arrays, events, config):
    """Angular errors of the model and of the line fit, and the truth, unit vectors (n, 3).

    With kappa the quantiles that tell its calibration.
    """
    truth = unit_vector(*(torch.from_numpy(events[angle].copy()) for angle in ("azimuth", "zenith")))
    direction, kappa, fit = (torch.from_numpy(arrays[name]) for name in ("direction", "kappa", "line_fit"))
    scores = {"error": angular_error(direction, truth), "fit_error": angular_error(fit, truth),
              "truth": truth}
    if "vmf" in config.direction_loss:
        scores["quantile"] = vmf_quantile(direction, kappa, truth)
    return {name: values.numpy() for name, values in scores.items()}


def guess_angle(truth):
    """The mean angle [rad] of always guessing one direction, that of the mean of all, unit vectors (n, 3).

    pi/2 if they come from everywhere alike; those that trigger a detector may not.
    """
    mean = truth.mean(axis=0)
    return np.arccos(np.clip(truth @ mean / max(np.linalg.norm(mean), 1e-12), -1, 1)).mean()


def direction_columns(arrays, config):
    """Angles as Kaggle wants them, azimuth in [0, 2 pi), zenith in [0, pi]; and the vector."""
    x, y, z = arrays["direction"].T.astype(np.float64)
    azimuth = np.arctan2(y, x) % (2 * np.pi)
    azimuth[azimuth >= 2 * np.pi] = 0.0  # a tiny negative angle plus 2 pi rounds up to 2 pi
    columns = {"azimuth": azimuth, "zenith": np.arccos(np.clip(z, -1, 1)), "x": x, "y": y, "z": z}
    return columns | ({"kappa": arrays["kappa"]} if "vmf" in config.direction_loss else {})


# ------------------------------------------------------------------------------------------------------------
# energy, class
# ------------------------------------------------------------------------------------------------------------

LOG_ENERGY = 4.0  # [log10 GeV] where a new energy head begins, the middle of IceCube's range


def class_losses(outputs, batch, config):
    is_track = (batch["event_class"] == 1).to(outputs["logit"].dtype)
    return F.binary_cross_entropy_with_logits(outputs["logit"], is_track, reduction="none")


def class_scores(arrays, events, config):
    """The probability of a track, and as error that of the wrong class; as baseline the line fit's speed.

    A muon's light moves through the detector with the muon, a cascade's spreads from one place to all sides:
    a line fitted to it hardly moves.
    """
    is_track = events["event_class"] == 1
    return {"error": np.abs(is_track - arrays["p_track"]), "p_track": arrays["p_track"],
            "speed": arrays["line_fit_speed"], "is_track": is_track}


def roc_area(number, is_positive):
    """The chance that of a positive and a negative event the positive one has the larger number.

    Ties count half. Exact, from ranks. NaN if all are of one kind.
    """
    is_positive = is_positive.astype(bool)
    n, n_positive = len(number), int(is_positive.sum())
    if n_positive in (0, n):
        return math.nan
    _, place, count = np.unique(number, return_inverse=True, return_counts=True)
    rank = (np.cumsum(count) - (count - 1) / 2)[place]  # from 1; equal numbers share the mean of their ranks
    n_won = rank[is_positive].sum() - n_positive * (n_positive + 1) / 2  # pairs
    return n_won / (n_positive * (n - n_positive))


def guess_accuracy(is_track):
    """That of always guessing the more common class."""
    return max(is_track.mean(), 1 - is_track.mean())


# ------------------------------------------------------------------------------------------------------------

TASKS = {
    "direction": Task(
        labels=("azimuth", "zenith"), width=3, outputs=direction_outputs, loss=direction_losses,
        score=direction_scores,
        statistics={"mean": (np.mean, "error"), "median": (np.median, "error"),
                    "68 %": (lambda error: np.quantile(error, 0.68), "error")},
        baselines={"line_fit_mean": (np.mean, "fit_error"), "line_fit_median": (np.median, "fit_error"),
                   "guess_mean": (guess_angle, "truth")},
        log={"val_angle_mean": "mean", "val_angle_median": "median"},
        result="angular error mean {mean:.4f}{mean_error} rad, median {median:.4f} rad",
        columns=direction_columns, csv=("azimuth", "zenith"),
        unit="rad", error="angular error", span=(0, np.pi),
        drawn={"median": "median angular error", "mean": "mean angular error"}),
    "energy": Task(
        labels=("energy",), width=1, outputs=lambda x: {"log_energy": x.squeeze(-1) + LOG_ENERGY},
        loss=lambda outputs, batch, config: (outputs["log_energy"] - torch.log10(batch["energy"])).square(),
        score=lambda arrays, events, config: {"error": arrays["log_energy"] - np.log10(events["energy"])},
        statistics={"bias": (np.mean, "error"), "resolution": (np.std, "error")}, baselines={},
        log={"val_bias": "bias", "val_resolution": "resolution"},
        result="log10(energy) bias {bias:+.4f}{bias_error}, resolution {resolution:.4f} dex",
        columns=lambda arrays, config: {"energy": 10.0 ** arrays["log_energy"].astype(np.float64)},
        csv=("energy",), unit="dex", error="log10 of predicted over true energy", span=(-2, 2),
        drawn={"resolution": "energy resolution"}),
    "class": Task(  # track (event_class 1) or cascade (2)
        labels=("event_class",), width=1,
        outputs=lambda x: {"p_track": x.squeeze(-1).sigmoid(), "logit": x.squeeze(-1)},
        loss=class_losses, score=class_scores,
        statistics={"accuracy": (lambda error: (error < 0.5).mean(), "error"),
                    "roc_area": (roc_area, "p_track", "is_track")},
        baselines={"guess_accuracy": (guess_accuracy, "is_track"),
                   "line_fit_roc_area": (roc_area, "speed", "is_track")},
        log={"val_accuracy": "accuracy", "val_roc_area": "roc_area"},
        result="accuracy {accuracy:.4f}{accuracy_error}, ROC area {roc_area:.4f}{roc_area_error}",
        columns=lambda arrays, config: {"p_track": arrays["p_track"]}, csv=("p_track",),
        unit="", error="probability of the wrong class", span=(0, 1),
        drawn={"roc_area": "ROC area"}),
}
