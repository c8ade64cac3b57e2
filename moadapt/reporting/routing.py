"""Heat maps of the mean routing, and how much it differs between tasks."""

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgba
from matplotlib.patches import Rectangle

from moadapt.reporting.chart import chart
from moadapt.reporting.markup import Markup, element, fragment
from moadapt.reporting.numerals import percent
from moadapt.reporting.palette import ACCENT, GROUND, INK, ON_ACCENT
from moadapt.reporting.paths import clipped, shortened
from moadapt.reporting.section import figure, figures, nothing, section
from moadapt.reporting.wording import task_title

Weights = np.ndarray[tuple[int, int, int], np.dtype[np.float64]]
"""(places, tasks, experts)."""
Shares = np.ndarray[tuple[int], np.dtype[np.float64]]

_ROW, _LOWEST_ROW, _NUMBERED_ROW, _HIGHEST = 30, 3, 13, 620
_MOST_NUMBERED = 8
_DARKEST = 0.95
_WIDTH, _CHARACTER = 340, 6
_LONGEST_BESIDE = 7
"""How many characters fit beside one row."""
_SHOWN = "Mean weight of each expert at each place, for inputs of {}"


def routing(table: Mapping[str, Any]) -> Markup:
    """Return the section of the routing.

    Args:
        table: `experts`, `places`, `tasks` and `weights` as [place][task][expert].
    """
    experts, places, tasks = (list(map(str, table.get(key) or ())) for key in ("experts", "places", "tasks"))
    if not (experts and places and tasks and table.get("weights")):
        return section("routing", "Routing", nothing("The mixture's routing has not been recorded yet."))
    weights = np.array(table["weights"], dtype=np.float64).reshape(len(places), len(tasks), len(experts))
    note = (
        "How much of each expert the routers give, as a share of one: the mean over held-out inputs of a task, at each "
        "place where a router sits, first to last through the model."
    )
    panels = [
        figure(heat_map(f"routing-{index}", _SHOWN.format(task), weights[:, index], experts, places), task_title(task))
        for index, task in enumerate(tasks)
    ]
    found = _sentences(weights, experts, places, tasks)
    return section(
        "routing",
        "Routing",
        element("p", note),
        element("p", *found, class_="finding") if found else None,
        figures(*panels),
    )


def moved(weights: Weights) -> dict[tuple[int, int], Shares]:
    """Return for each pair of tasks how much of the weight changes hands between them, at each place.

    That is half the sum of absolute differences, each routing scaled to sum to one: 0 where two tasks are routed alike,
    1 where they share no expert.

    Args:
        weights: From 0; those of one place and task may all be 0.
    """
    sums = weights.sum(axis=2, keepdims=True)
    shares = np.divide(weights, sums, out=np.zeros_like(weights), where=sums > 0)
    pairs = combinations(range(weights.shape[1]), 2)
    return {(a, b): np.abs(shares[:, a] - shares[:, b]).sum(axis=1) / 2 for a, b in pairs}


def _sentences(
    weights: Weights, experts: Sequence[str], places: Sequence[str], tasks: Sequence[str]
) -> list[Markup | str]:
    return [*_between_tasks(moved(weights), places, tasks), *_own_experts(weights, experts, tasks)]


def _between_tasks(
    changes: Mapping[tuple[int, int], Shares], places: Sequence[str], tasks: Sequence[str]
) -> list[Markup | str]:
    """Say how differently tasks are routed, where there are two."""
    if not changes:
        return []
    by_place = np.mean(list(changes.values()), axis=0)
    (a, b), most = max(changes.items(), key=lambda item: float(item[1].mean()))
    place = int(by_place.argmax())
    where = f", and at {places[place]} ({percent(float(by_place[place]))})" if len(places) > 1 else ""
    return [
        "From one task to another, on average ",
        element("b", percent(float(by_place.mean()))),
        " of the weight moves to other experts (0 % would be the same routing for all, 100 % no shared expert). ",
        f"It is most between {tasks[a]} and {tasks[b]} ({percent(float(most.mean()))}){where}. ",
    ]


def _own_experts(weights: Weights, experts: Sequence[str], tasks: Sequence[str]) -> list[Markup | str]:
    """Say how much goes to the experts that are named after tasks, where there are some."""
    own = {
        task: float(weights[:, index, experts.index(task)].mean())
        for index, task in enumerate(tasks)
        if task in experts
    }
    if not own:
        return []
    given = [fragment(element("b", percent(share)), f" for {task}") for task, share in own.items()]
    listing = [fragment(", " if index else "", text) for index, text in enumerate(given)]
    even = percent(1 / len(experts))
    start = "The expert that bears a task's name gets, of inputs of that task, "
    return [start, *listing, f"; an even split would be {even}."]


def heat_map(
    name: str,
    label: str,
    weights: np.ndarray[Any, Any],
    experts: Sequence[str],
    rows: Sequence[str],
    rows_are: str = "place of the router",
) -> Markup:
    """Draw shares of experts, one row each.

    Args:
        name: Of the chart; no other of the page has it.
        label: What it shows, for those who cannot see it.
        weights: From 0 to 1, (rows, E).
        experts: Names, E.
        rows: Names of the rows.
        rows_are: What the rows are, beside the axis.
    """
    row = max(_LOWEST_ROW, min(_ROW, _HIGHEST / len(rows)))
    every = 1 if row >= _NUMBERED_ROW else int(np.ceil(_NUMBERED_ROW / row))
    columns = [clipped(expert) for expert in experts]
    upright = _CHARACTER * sum(map(len, columns)) > _WIDTH / 2
    head = _CHARACTER * max(map(len, columns)) if upright else 0

    def draw(axes: Axes) -> None:
        for (place, expert), weight in np.ndenumerate(weights):
            alpha = _DARKEST * float(np.clip(weight, 0, 1))
            axes.add_patch(_cell(expert, place, alpha))
            if every == 1 and len(experts) <= _MOST_NUMBERED:
                colour = ON_ACCENT if alpha > 0.75 else INK
                axes.text(expert, place, f"{weight:.2f}", color=colour.light, ha="center", va="center", size=10)
        _frame(axes, rows, every, rows_are)
        axes.set_xticks(range(len(columns)), columns, rotation=90 if upright else 0)

    return chart(draw, width=_WIDTH, height=row * len(rows) + head + 62, name=name, label=label)


def _cell(expert: int, place: int, alpha: float) -> Rectangle:
    corner = (expert - 0.5, place - 0.5)
    return Rectangle(corner, 1, 1, facecolor=to_rgba(ACCENT.light, alpha), edgecolor=GROUND.light, linewidth=1)


def _frame(axes: Axes, places: Sequence[str], every: int, rows_are: str) -> None:
    axes.autoscale_view(tight=True)
    axes.set_ylim(len(places) - 0.5, -0.5)
    axes.set_yticks(range(0, len(places), every), shortened(places)[::every])
    axes.xaxis.tick_top()
    axes.xaxis.set_label_position("top")
    axes.set_xlabel("expert")
    axes.set_ylabel(rows_are if len(rows_are) < _LONGEST_BESIDE * len(places) else "")
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
