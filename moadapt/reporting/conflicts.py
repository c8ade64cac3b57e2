"""How tasks oppose each other in what they share: a heat map of cosines of gradients, and their course."""

from collections.abc import Sequence

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from moadapt.reporting.chart import STYLE
from moadapt.reporting.overlaps import Matrix
from moadapt.reporting.palette import ACCENT, GROUND, INK, ON_ACCENT, RUNS
from moadapt.reporting.paths import clipped

_CELL, _COURSE, _INCH = 0.52, 2.3, 1.6
_MOST_NUMBERED = 10
_DARKEST = 0.95
_OPPOSED, _AGREED = RUNS["single_lora"], ACCENT


def conflict_picture(tasks: Sequence[str], steps: Sequence[int], matrices: Matrix) -> Figure:
    """Draw the mean cosine of every two tasks over the second half of the measurements, and the course of all pairs.

    Args:
        tasks: Their names, S.
        steps: When it was measured, N.
        matrices: Cosines, -1 to 1, (N, S, S); NaN where two tasks did not meet.
    """
    side = _CELL * len(tasks) + _INCH
    pairs = matrices[:, *np.triu_indices(len(tasks), k=1)]
    with matplotlib.rc_context({**STYLE, "figure.facecolor": GROUND.light, "savefig.facecolor": GROUND.light}):
        figure = Figure(figsize=(max(7.0, side), side + _COURSE), layout="constrained")
        grid = figure.add_gridspec(2, 1, height_ratios=[side, _COURSE])
        _heat_map(figure.add_subplot(grid[0]), tasks, _mean(matrices[len(matrices) // 2 :]))
        _course(figure.add_subplot(grid[1]), steps, pairs)
    return figure


def _mean(matrices: Matrix) -> Matrix:
    present = ~np.isnan(matrices)
    with np.errstate(invalid="ignore"):
        mean: Matrix = np.where(present, matrices, 0).sum(axis=0) / present.sum(axis=0)
    return mean


def _heat_map(axes: Axes, tasks: Sequence[str], matrix: Matrix) -> None:
    for (row, column), value in np.ndenumerate(matrix):
        if row == column or np.isnan(value):
            continue
        alpha, shade = _DARKEST * min(1.0, abs(value)), _OPPOSED if value < 0 else _AGREED
        face = to_rgba(shade.light, alpha)
        axes.add_patch(Rectangle((column - 0.5, row - 0.5), 1, 1, facecolor=face, edgecolor=GROUND.light, linewidth=1))
        if len(tasks) <= _MOST_NUMBERED:
            ink = ON_ACCENT if alpha > 0.75 else INK
            axes.text(column, row, f"{value:.2f}", color=ink.light, ha="center", va="center", size=9)
    ticks = [clipped(name) for name in tasks]
    axes.set(xlim=(-0.5, len(tasks) - 0.5), ylim=(len(tasks) - 0.5, -0.5), aspect="equal")
    axes.set_xticks(range(len(tasks)), ticks, rotation=45, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(len(tasks)), ticks)
    axes.set_title("cosine of gradients of the shared adapter, second half")
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)


def _course(axes: Axes, steps: Sequence[int], pairs: Matrix) -> None:
    met = ~np.isnan(pairs).all(axis=1)
    when, pairs = np.asarray(steps)[met], pairs[met]
    axes.plot(when, np.nanmean(pairs, axis=1), marker="o", markersize=3, color=_AGREED.light, label="mean of all pairs")
    axes.plot(when, np.nanmin(pairs, axis=1), marker="o", markersize=3, color=_OPPOSED.light, label="lowest")
    axes.axhline(0, color=INK.light, linewidth=0.7)
    axes.set_ylim(-1.05, 1.05)
    axes.set_ylabel("cosine")
    axes.set_xlabel("step")
    axes.grid(axis="y")
    axes.legend(frameon=False, fontsize=10, labelcolor=INK.light, ncols=2, loc="lower right", bbox_to_anchor=(1, 1))
