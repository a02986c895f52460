"""The pictures: of a comparison (losses, difference, gradient norm, learning rate), and of update ratios."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from compare import SAME_PATH_STEPS, loss_differences
from loop import Row
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter
from recipes import TITLES


@dataclass(frozen=True)
class Pen:
    """How a run is drawn."""

    color: str
    line: dict[str, Any]
    marker: str
    size: int


#: In drawing order: torch broad and pale, the fused run dashed on top, so that both show where they coincide.
PENS = {
    "torch": Pen("#a9b4be", {"linewidth": 4}, "s", 9),
    "uniform": Pen("#e08a2c", {"linewidth": 1.3}, "D", 5),
    "fused": Pen("#0b5f8a", {"linewidth": 1.5, "linestyle": (0, (4, 2))}, "o", 4),
}
STYLE = {
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e6e9ec",
    "axes.axisbelow": True,
    "legend.framealpha": 0.9,
    "legend.edgecolor": "none",
    "legend.fontsize": 9,
    "legend.title_fontsize": 9,
}


def smooth(values: Sequence[float], window: int) -> np.ndarray:
    """Average each value with up to `window - 1` before it."""
    sums = np.cumsum([0.0, *values])
    ends = np.arange(1, len(sums))
    starts = np.maximum(ends - window, 0)
    return (sums[ends] - sums[starts]) / (ends - starts)


def column(rows: Sequence[Row], name: str) -> list[float]:
    return [row[name] for row in rows]


def draw_losses(axes: Axes, runs: Mapping[str, Sequence[Row]]) -> None:
    """Draw training losses as lines, averaged over a few steps, and validation losses as points."""
    window = max(1, max(map(len, runs.values())) // 40)
    for run, pen in PENS.items():
        rows = runs[run]
        losses = smooth(column(rows, "train_loss"), window)
        axes.plot(column(rows, "step"), losses, color=pen.color, label=TITLES[run], **pen.line)
    for run, pen in PENS.items():
        rows = [row for row in runs[run] if row["val_loss"] is not None]
        style: dict[str, Any] = {
            "color": pen.color,
            "markersize": pen.size,
            "markeredgecolor": "white",
            "markeredgewidth": 0.7,
        }
        axes.plot(column(rows, "step"), column(rows, "val_loss"), pen.marker, **style)
    lines = "lines: training" + (f", mean of {window} steps" if window > 1 else "")
    axes.set(title="Loss", ylabel="cross-entropy (nats)")
    axes.legend(loc="upper right", title=f"{lines}; points: validation")


def draw_difference(axes: Axes, runs: Mapping[str, Sequence[Row]], allowed: float) -> None:
    """Draw how far the fused run is from torch's, and how far it may be."""
    differences = loss_differences(runs["torch"], runs["fused"])
    seen = differences > 0  # a logarithmic axis has no place for equality: the legend counts it
    steps = np.arange(1, len(differences) + 1)
    axes.semilogy(
        steps[seen], differences[seen], ".", markersize=4, color=PENS["fused"].color, label="difference"
    )
    limit = f"allowed in the first {SAME_PATH_STEPS} steps"
    axes.hlines(allowed, 1, SAME_PATH_STEPS, color="#b83232", linewidth=2, label=limit)
    drawn = np.append(differences[seen], allowed)
    axes.set_ylim(drawn.min() / 100, 3 * drawn.max())  # room for the legend below
    axes.set(title="How far the two optimizers part", ylabel="|torch loss − fused loss| (nats)")
    axes.legend(
        loc="lower right", title=f"{np.sum(differences == 0)} of {len(differences)} losses are bitwise equal"
    )


def draw_column(axes: Axes, runs: Mapping[str, Sequence[Row]], name: str) -> None:
    """Draw one metric of all runs."""
    for run, pen in PENS.items():
        axes.plot(column(runs[run], "step"), column(runs[run], name), color=pen.color, **pen.line)


def draw_picture(
    runs: Mapping[str, Sequence[Row]], allowed: float, clip: float, title: str, path: Path
) -> None:
    """Draw the runs of one seed, by name, into a PNG; `allowed` is how far torch and fused may part."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(12, 7.6), layout="constrained")
        figure.suptitle(title, x=0.01, ha="left", fontsize=13)
        (losses, difference), (norm, rate) = figure.subplots(2, 2, sharex=True)
        draw_losses(losses, runs)
        draw_difference(difference, runs, allowed)
        draw_column(norm, runs, "grad_norm")
        if math.isfinite(clip):
            norm.axhline(clip, color="#b83232", linewidth=1, linestyle=":", label=f"clipped above {clip:g}")
            norm.legend(loc="upper right")
        draw_column(rate, runs, "learning_rate")
        norm.set(title="Gradient norm before the clip", ylabel="L2 norm", yscale="log")
        norm.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        norm.yaxis.set_major_formatter("{x:g}")
        norm.yaxis.set_minor_formatter(NullFormatter())
        rate.set(title="Learning rate", ylabel="learning rate", ylim=(0, None))
        rate.yaxis.set_major_formatter("{x:g}")
        for axes in (norm, rate):
            axes.set_xlabel("step")
            axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
        figure.align_ylabels()
        figure.savefig(path, dpi=150)


#: Of update ratios by role, in the metrics of a run.
RATIO = "optim/update_ratio/role "
ROLE_COLORS = mpl.colormaps["tab10"].colors


def ratios_by_role(rows: Sequence[Row]) -> dict[str, tuple[list[int], list[float]]]:
    """Find the update ratios in the rows of a run: steps and values by role."""
    found: dict[str, tuple[list[int], list[float]]] = {}
    for row in rows:
        for name, ratio in row.items():
            if name.startswith(RATIO):
                steps, ratios = found.setdefault(name.removeprefix(RATIO), ([], []))
                steps.append(row["step"])
                ratios.append(ratio)
    return found


def draw_ratios(runs: Mapping[str, Sequence[Row]], title: str, path: Path) -> None:
    """Draw how large updates were beside the parameters, by role, into a PNG; an axes for each run."""
    found = {run: ratios_by_role(rows) for run, rows in runs.items()}
    roles = list(dict.fromkeys(role for by_role in found.values() for role in by_role))
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(max(7.5, 4.5 * len(found)), 4.6), layout="constrained")
        figure.suptitle(title, x=0.01, ha="left", fontsize=13)
        handles: dict[str, Line2D] = {}
        (all_axes,) = figure.subplots(1, len(found), sharey=True, squeeze=False)
        for axes, (run, by_role) in zip(all_axes, found.items(), strict=True):
            for role, (steps, ratios) in by_role.items():
                color = ROLE_COLORS[roles.index(role) % len(ROLE_COLORS)]
                axes.plot(steps, ratios, color=color, linewidth=1.5, label=role)
            handles |= dict(zip(by_role, axes.lines, strict=True))
            axes.set(title=run, xlabel="step", yscale="log")
            axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
        figure.legend(handles.values(), handles, loc="outside right center", title="role")
        all_axes[0].set_ylabel("norm of the update / norm of the parameters")
        figure.savefig(path, dpi=150)
