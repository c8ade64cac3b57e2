"""What the comparison of rows comes to: the differences of the main score of each task."""

from collections.abc import Sequence

from moadapt.reporting.columns import COLUMNS, Column, Row
from moadapt.reporting.markup import Markup, element, fragment
from moadapt.reporting.numerals import MISSING, signed

_COMPARED = (
    ("mixture", "base", "Mixture against the untrained base"),
    ("mixture", "single_lora", "Mixture against one LoRA for all tasks"),
    ("mixture", "lora_per_task", "Mixture against one LoRA per task, which is told the task"),
    ("mixture_merged_per_task", "mixture", "Merged, a model per task, against the mixture"),
    ("mixture_merged", "mixture", "Merged, one model, against the mixture"),
)
_MAIN = tuple(
    next(column for column in COLUMNS if column.group == group) for group in ("vqa", "captioning", "grounding")
)


def differences(rows: Sequence[Row]) -> Markup | None:
    """Return a table of what was gained or lost; None where no two rows of a comparison are there.

    Args:
        rows: The rows of the results.
    """
    named = {row["name"]: row for row in rows}
    lines = [
        element("tr", element("th", title, scope="row"), *(_change(column, named[a], named[b]) for column in _MAIN))
        for a, b, title in _COMPARED
        if a in named and b in named
    ]
    if not lines:
        return None
    heads = [element("th", f"{column.name}{', points' if _in_points(column) else ''}", scope="col") for column in _MAIN]
    table = element(
        "table", element("thead", element("tr", element("td"), *heads)), element("tbody", *lines), class_="narrow"
    )
    return fragment(element("h3", "Differences"), element("div", table, class_="wide"))


def _in_points(column: Column) -> bool:
    return column.factor == 100


def _change(column: Column, row: Row, other: Row) -> Markup:
    value, reference = column.value(row), column.value(other)
    if value is None or reference is None:
        return element("td", MISSING)
    return element("td", signed((value - reference) * column.factor, column.digits))
