"""How much the adapters of a mixture overlap: heat maps of the mean over sites, and a curve over the layers."""

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from moadapt.reporting.chart import STYLE
from moadapt.reporting.palette import ACCENT, GROUND, INK, ON_ACCENT, RUNS
from moadapt.reporting.paths import clipped

Matrix = np.ndarray[Any, np.dtype[np.float64]]

_CELL, _CURVE, _INCH = 0.52, 2.3, 1.6
_MOST_NUMBERED = 10
_MOST_PLACES = 7
_DARKEST = 0.95
_LINES = (RUNS["mixture"], RUNS["single_lora"])


def overlap_picture(
    names: Sequence[str], matrices: Mapping[str, Matrix], places: Sequence[str], curves: Mapping[str, Sequence[float]]
) -> Figure:
    """Draw the overlaps.

    Args:
        names: Of the adapters, E.
        matrices: By measure the overlap of every pair, 0 to 1, (E, E); NaN where two never meet.
        places: Layers in model order, L.
        curves: By measure the mean overlap of different adapters in each layer, (L,).
    """
    side = _CELL * len(names) + _INCH
    heights = [side, _CURVE]
    with matplotlib.rc_context({**STYLE, "figure.facecolor": GROUND.light, "savefig.facecolor": GROUND.light}):
        figure = Figure(figsize=(max(7.0, side * len(matrices)), sum(heights)), layout="constrained")
        grid = figure.add_gridspec(2, len(matrices), height_ratios=heights)
        for column, (measure, matrix) in enumerate(matrices.items()):
            _heat_map(figure.add_subplot(grid[0, column]), measure, names, matrix)
        _curve(figure.add_subplot(grid[1, :]), places, curves)
    return figure


def _heat_map(axes: Axes, measure: str, names: Sequence[str], matrix: Matrix) -> None:
    for (row, column), value in np.ndenumerate(matrix):
        if row == column or np.isnan(value):
            continue
        alpha = _DARKEST * float(np.clip(value, 0, 1))
        corner = (column - 0.5, row - 0.5)
        colour = to_rgba(ACCENT.light, alpha)
        axes.add_patch(Rectangle(corner, 1, 1, facecolor=colour, edgecolor=GROUND.light, linewidth=1))
        if len(names) <= _MOST_NUMBERED:
            ink = ON_ACCENT if alpha > 0.75 else INK
            axes.text(column, row, f"{value:.2f}", color=ink.light, ha="center", va="center", size=9)
    ticks = [clipped(name) for name in names]
    axes.set(xlim=(-0.5, len(names) - 0.5), ylim=(len(names) - 0.5, -0.5), aspect="equal")
    axes.set_xticks(range(len(names)), ticks, rotation=45, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(len(names)), ticks)
    axes.set_title(f"{measure}, mean over sites")
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)


def _curve(axes: Axes, places: Sequence[str], curves: Mapping[str, Sequence[float]]) -> None:
    for (measure, values), shade in zip(curves.items(), _LINES, strict=False):
        axes.plot(range(len(places)), values, marker="o", markersize=3, color=shade.light, label=measure)
    every = -(-len(places) // _MOST_PLACES)
    axes.set_xticks(range(0, len(places), every), list(places)[::every])
    axes.set_ylim(bottom=0)
    axes.set_ylabel("mean overlap")
    axes.set_xlabel("layer")
    axes.grid(axis="y")
    axes.legend(frameon=False, fontsize=10, labelcolor=INK.light, ncols=2, loc="lower right", bbox_to_anchor=(1, 1))
