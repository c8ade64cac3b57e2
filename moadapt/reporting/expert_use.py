"""Who is used how much: load by place and by modality, tasks against experts, and the measures of every place."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from moadapt.reporting.markup import Markup, element, fragment
from moadapt.reporting.numerals import fixed, percent
from moadapt.reporting.routing import heat_map
from moadapt.reporting.section import figure, figures, nothing, section
from moadapt.reporting.wording import listed

COLUMNS = {
    "effective_experts": ("effective experts", "how many experts an input uses, those of small weight counting little"),
    "entropy": ("entropy, nats", "how evenly an input's weight is spread, from 0, one expert, to ln E"),
    "input_information": ("I(input; expert)", "how far inputs are told apart, from 0 to ln E"),
    "task_information": ("I(task; expert)", "how far tasks are told apart, from 0 to ln E"),
    "dead_experts": ("dead", "share of experts that get less than a tenth of an even split"),
    "dropped": ("dropped", "share of chosen experts that got weight 0"),
    "drift": ("drift", "how much of the weight moved since the validation before, row by row"),
}
"""Measures that are one number, with their heading and what they mean."""
_DEAD = 0.1
_NAMED = 6


def expert_use(record: Mapping[str, Any]) -> Markup:
    """Return the section of the measures of the last validation.

    Args:
        record: What `routing.json` holds; empty where nothing was measured.
    """
    places: Mapping[str, Any] = record.get("places") or {}
    if not places:
        return section("use", "Use of experts", nothing("The routing was not measured in this run."))
    experts, tasks = list(map(str, record["experts"])), list(map(str, record["tasks"]))
    note = (
        f"Measured at step {record.get('step')} on the prompts of the validation split. What an expert gets is its "
        "share of all weight at a place."
    )
    loads, confusion = _loads(experts, places), _confusion(experts, tasks, places)
    return section(
        "use",
        "Use of experts",
        element("p", note),
        element("p", _dead(experts, places), class_="finding"),
        figures(*loads, *confusion) if len(loads) < 3 else fragment(figures(*loads), figures(*confusion)),
        _table(places),
    )


def task_table(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the section of the routing draws: `experts`, `places`, `tasks` and `weights`, where tasks are known.

    Args:
        record: What `routing.json` holds; empty where nothing was measured.
    """
    by_task = {place: values["load_by_task"] for place, values in (record.get("places") or {}).items()}
    tasks = [
        index
        for index, _ in enumerate(record.get("tasks") or ())
        if any(_known(rows[index]) for rows in by_task.values())
    ]
    whole = {place: [rows[i] for i in tasks] for place, rows in by_task.items() if all(_known(rows[i]) for i in tasks)}
    return {
        "experts": record.get("experts") or [],
        "places": list(whole),
        "tasks": [record["tasks"][index] for index in tasks],
        "weights": list(whole.values()),
    }


def _loads(experts: Sequence[str], places: Mapping[str, Any]) -> list[Markup]:
    """Draw all inputs, and text and image tokens apart where they are known."""
    found = [("load", "All inputs", {place: values["load"] for place, values in places.items()})]
    for index, name in enumerate(("Text tokens", "Image tokens")):
        apart = {place: values["load_by_modality"][index] for place, values in places.items()}
        found.append((f"modality-{index}", name, {place: row for place, row in apart.items() if _known(row)}))
    label = "Load of each expert at each place: {}"
    return [
        figure(heat_map(name, label.format(title), np.array(list(rows.values())), experts, list(rows)), title)
        for name, title, rows in found
        if rows
    ]


def _confusion(experts: Sequence[str], tasks: Sequence[str], places: Mapping[str, Any]) -> list[Markup]:
    table = task_table({"experts": experts, "tasks": tasks, "places": places})
    if not table["places"]:
        return []
    mean = np.array(table["weights"], dtype=np.float64).mean(axis=0)
    label = "Mean over places of what each expert gets of each task"
    content = heat_map("confusion", label, mean, experts, table["tasks"], "task")
    return [figure(content, "Tasks against experts, mean over places")]


def _dead(experts: Sequence[str], places: Mapping[str, Any]) -> str:
    dead = [
        f"{expert} at {place}"
        for place, values in places.items()
        for expert, share in zip(experts, values["load"], strict=True)
        if share * len(experts) < _DEAD
    ]
    if not dead:
        return f"No expert is dead: at every place each gets at least {percent(_DEAD / len(experts))} of the weight."
    more = [f"{len(dead) - _NAMED} more"] if len(dead) > _NAMED else []
    limit = percent(_DEAD / len(experts))
    return f"Experts that get less than {limit} of the weight: {listed([*dead[:_NAMED], *more])}."


def _table(places: Mapping[str, Any]) -> Markup:
    shown = [name for name in COLUMNS if any(values.get(name) is not None for values in places.values())]
    head = element(
        "tr", element("th", "place"), *(element("th", COLUMNS[name][0], title=COLUMNS[name][1]) for name in shown)
    )
    body = [
        element("tr", element("th", place), *(element("td", fixed(values.get(name), 3)) for name in shown))
        for place, values in places.items()
    ]
    meanings = [element("div", element("dt", COLUMNS[name][0]), element("dd", COLUMNS[name][1])) for name in shown]
    table = element("table", element("thead", head), element("tbody", *body), class_="measured")
    return element("div", element("div", table, class_="wide"), element("dl", *meanings, class_="inline"))


def _known(shares: Sequence[float | None]) -> bool:
    return all(share is not None for share in shares)
