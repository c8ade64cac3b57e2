"""The table of results: one row a way to share adapters, one column a score."""

from collections.abc import Sequence

from moadapt.reporting.columns import COLUMNS, GROUPS, Column, Row
from moadapt.reporting.differences import differences
from moadapt.reporting.markup import Markup, element
from moadapt.reporting.palette import shade_of
from moadapt.reporting.section import defined, nothing, section, swatch
from moadapt.reporting.wording import row_words


def results(rows: Sequence[Row]) -> Markup:
    """Return the section of the table.

    Args:
        rows: One a way to share adapters.
    """
    if not rows:
        return section("results", "Results", nothing("No row has been evaluated yet."))
    note = (
        "Best of each column in bold with a dot; for costs that is the lowest, the base model left out. The thin bar "
        "is the score on its full scale. A dash: not measured, or nothing was trained. One seed: small differences are "
        "chance."
    )
    meanings = [(column.name, column.meaning) for column in COLUMNS]
    return section(
        "results",
        "Results",
        element("div", _table(rows), class_="wide"),
        element("p", note, class_="aside"),
        defined(meanings, "inline"),
        differences(rows),
    )


def _table(rows: Sequence[Row]) -> Markup:
    best = {column: _best(column, rows) for column in COLUMNS}
    groups = dict.fromkeys(column.group for column in COLUMNS)
    spans = [element("th", GROUPS[g], colspan=sum(c.group == g for c in COLUMNS), scope="colgroup") for g in groups]
    heads = [element("th", column.title, scope="col", class_=_edge(column)) for column in COLUMNS]
    body = [
        element(
            "tr",
            element("th", swatch(shade_of(row["name"]).variable), row_words(row["name"]).title, scope="row"),
            *(_cell(column, row, best[column]) for column in COLUMNS),
        )
        for row in rows
    ]
    head = element("thead", element("tr", element("td"), *spans), element("tr", element("td"), *heads))
    return element("table", head, element("tbody", *body), class_="results")


def _cell(column: Column, row: Row, best: str | None) -> Markup:
    value = column.value(row)
    text = column.text(None if column.top is None and not value else value)
    style = None
    if value is not None and column.top is not None:
        share = max(0.0, min(1.0, value / column.top))
        style = f"--share:{share:.4f};--bar:var({shade_of(row['name']).variable})"
    wins = best is not None and text == best
    content = element("b", text, title="best of this column") if wins else text
    return element(
        "td", content, class_=f"{_edge(column) or ''}{' scored' if style else ''}".strip() or None, style=style
    )


def _edge(column: Column) -> str | None:
    first = next(other for other in COLUMNS if other.group == column.group)
    return "edge" if column is first else None


def _best(column: Column, rows: Sequence[Row]) -> str | None:
    """Return the best value as it is written, so that what looks equal is marked alike."""
    if column.top is not None:
        values = [value for row in rows if (value := column.value(row)) is not None]
        return column.text(max(values)) if len(values) > 1 else None
    costs = [value for row in rows if row["name"] != "base" and (value := column.value(row))]
    return column.text(min(costs)) if len(costs) > 1 else None
