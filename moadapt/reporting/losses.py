"""Loss curves: one chart for all tasks together and one a task, each run in its colour."""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from moadapt.reporting.chart import chart
from moadapt.reporting.markup import Markup, element, fragment
from moadapt.reporting.numerals import percent
from moadapt.reporting.palette import shade_of
from moadapt.reporting.section import figure, figures, nothing, section, swatch
from moadapt.reporting.wording import row_words, task_title

Points = Sequence[Sequence[float]]
"""Pairs of step and loss."""
Pairs = np.ndarray[tuple[int, int], np.dtype[np.float64]]
Values = np.ndarray[tuple[int], np.dtype[np.float64]]

_ALL = "all"
_WINDOW = 0.05
"""Share of the steps that a smoothed point averages."""


def losses(runs: Mapping[str, Mapping[str, Points]]) -> Markup:
    """Return the section of the loss curves.

    Args:
        runs: By run, the losses by task and, under `all`, of all tasks.
    """
    found = {run: {task: finite(points) for task, points in curves.items()} for run, curves in runs.items()}
    tasks = list(dict.fromkeys(task for curves in found.values() for task, points in curves.items() if len(points)))
    if not tasks:
        return section("losses", "Loss during training", nothing("No training step has been recorded yet."))
    charts = [
        _panel(f"loss-{index}", task, {run: curves[task] for run, curves in found.items() if len(curves.get(task, ()))})
        for index, task in enumerate(tasks)
    ]
    note = (
        "Cross-entropy of the expected answer, in nats per token, on the training batches. Thick: mean over a window "
        f"of {percent(_WINDOW, 0)} of the steps; thin: every step. Lower is better; the scale is logarithmic."
    )
    key = [fragment(swatch(shade_of(run).variable), row_words(run).title, " ") for run in found]
    return section(
        "losses",
        "Loss during training",
        element("p", note),
        element("p", *(element("span", entry) for entry in key), class_="key"),
        figures(*charts),
    )


def finite(points: Points) -> Pairs:
    """Return the points that can stand on a logarithmic scale, in the order of their steps.

    Args:
        points: Pairs of step and loss.

    Returns:
        (N, 2).
    """
    pairs = np.array([tuple(point) for point in points], dtype=np.float64).reshape(-1, 2)
    pairs = pairs[np.isfinite(pairs).all(axis=1) & (pairs[:, 1] > 0)]
    ordered: Pairs = pairs[np.argsort(pairs[:, 0], kind="stable")]
    return ordered


def smoothed(values: Values) -> Values:
    """Return the centred moving average; at the ends, of what there is.

    Args:
        values: (N,), at least one.
    """
    reach = max(1, round(len(values) * _WINDOW / 2))
    sums = np.concatenate([[0.0], np.cumsum(values)])
    index = np.arange(len(values))
    first, last = np.maximum(index - reach, 0), np.minimum(index + reach + 1, len(values))
    means: Values = (sums[last] - sums[first]) / (last - first)
    return means


def _panel(name: str, task: str, curves: Mapping[str, Pairs]) -> Markup:
    def draw(axes: Axes) -> None:
        for run, points in curves.items():
            colour = shade_of(run).light
            axes.plot(points[:, 0], points[:, 1], color=colour, linewidth=0.6, alpha=0.35)
            axes.plot(points[:, 0], smoothed(points[:, 1]), color=colour, linewidth=1.8)
        _scale(axes)

    title = "All tasks" if task == _ALL else task_title(task)
    label = f"Loss of {title} over training steps, for {', '.join(curves)}"
    return figure(chart(draw, width=260, height=210, name=name, label=label), title)


def _scale(axes: Axes) -> None:
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.grid(True, axis="y")
    axes.margins(x=0.01)
    axes.set_xlabel("training step")
    axes.set_ylabel("loss, nats per token")
