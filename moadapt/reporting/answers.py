"""What a trained mixture answered, a table of a few rows a task."""

from collections.abc import Mapping, Sequence
from typing import Any

from moadapt.reporting.markup import Markup, element
from moadapt.reporting.section import nothing, section
from moadapt.reporting.wording import task_title

_EACH = 6
_LONGEST = 160


def answers(predictions: Sequence[Mapping[str, Any]]) -> Markup:
    """Return the section of the answers.

    Args:
        predictions: Lines of `predictions.jsonl`; empty where none were made.
    """
    if not predictions:
        why = "No answers were written; `moadapt predict` writes some."
        return section("answers", "Answers", nothing(why))
    tasks = list(dict.fromkeys(str(row["task"]) for row in predictions))
    tables = [part for task in tasks for part in _table(task, [row for row in predictions if row["task"] == task])]
    note = f"The first answers to each task of the test split, of {len(predictions)} in all."
    return section("answers", "Answers", element("p", note), *tables)


def _table(task: str, rows: Sequence[Mapping[str, Any]]) -> list[Markup]:
    columns = ("prompt", "text", "reference")
    head = element("tr", *(element("th", name, class_="text") for name in ("asked", "answered", "reference")))
    body = [
        element("tr", *(element("td", _short(row.get(name)), class_="text wrapped") for name in columns))
        for row in rows[:_EACH]
    ]
    table = element("table", element("thead", head), element("tbody", *body))
    return [element("h3", task_title(task)), element("div", table, class_="wide")]


def _short(value: Any) -> str:
    words = value if isinstance(value, str) else _listing(value)
    return words if len(words) <= _LONGEST else f"{words[: _LONGEST - 1]}…"


def _listing(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(dict.fromkeys(f"{x:g}" if isinstance(x, float) else str(x) for x in value))
    return str(value)
