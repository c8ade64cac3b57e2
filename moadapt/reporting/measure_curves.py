"""Measures of routing and values of objectives over the training steps: the mean over places, and every place."""

import math
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from moadapt.reporting.chart import chart
from moadapt.reporting.expert_use import COLUMNS
from moadapt.reporting.markup import Markup, element
from moadapt.reporting.palette import ACCENT, MUTED
from moadapt.reporting.section import figure, figures, nothing, section

Points = Sequence[Sequence[float]]
"""Pairs of step and value."""
_MEAN = ""
_LEAST_TOP = 0.1


def measure_curves(
    curves: Mapping[str, Mapping[str, Points]], objectives: Mapping[str, Points], num_experts: int
) -> Markup:
    """Return the section of the measures over the training.

    Args:
        curves: By measure, points by place; the mean over places under an empty name.
        objectives: By objective, points.
        num_experts: E, which bounds some of them.
    """
    title = "Measures over the training"
    if not (curves or objectives):
        return section("curves", title, nothing("No measure has been logged."))
    note = (
        "Thick: mean over the places of routers; thin: each place. Measured at validations; the values of objectives, "
        "not weighted, in training batches."
    )
    ordered = sorted(curves.items(), key=lambda item: list(COLUMNS).index(item[0]) if item[0] in COLUMNS else 99)
    panels = [
        _panel(f"curve-{index}", COLUMNS.get(name, (name,))[0], of, _range(name, of, num_experts))
        for index, (name, of) in enumerate(ordered)
    ]
    panels += [
        _panel(f"objective-{index}", f"objective: {name}", {_MEAN: points})
        for index, (name, points) in enumerate(objectives.items())
    ]
    return section("curves", title, element("p", note), figures(*panels))


def _range(measure: str, curves: Mapping[str, Points], num_experts: int) -> tuple[float, float]:
    """Return the lowest and highest value that an axis shows: what is possible, or for small shares what there is."""
    if measure == "effective_experts":
        return 1.0, max(2.0, num_experts)
    if measure in ("entropy", "input_information", "task_information"):
        return 0.0, max(_LEAST_TOP, math.log(max(1, num_experts)))
    highest = max(value for points in curves.values() for _, value in points)
    return 0.0, max(_LEAST_TOP, 1.1 * highest)


def _panel(name: str, title: str, curves: Mapping[str, Points], between: tuple[float, float] | None = None) -> Markup:
    def draw(axes: Axes) -> None:
        for place, points in sorted(curves.items(), reverse=True):  # the mean comes last, on top
            steps, values = np.array([tuple(point) for point in points], dtype=np.float64).reshape(-1, 2).T
            if place == _MEAN:
                mark = "o" if len(steps) < 12 else None
                axes.plot(steps, values, color=ACCENT.light, linewidth=2, marker=mark, markersize=4)
            else:
                axes.plot(steps, values, color=MUTED.light, linewidth=0.7, alpha=0.5)
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.grid(True, axis="y")
        axes.margins(x=0.04)
        if between is not None:
            low, high = between
            axes.set_ylim(low - 0.03 * (high - low), high + 0.03 * (high - low))
        axes.set_xlabel("training step")

    return figure(chart(draw, width=260, height=190, name=name, label=f"{title} over training steps"), title)
