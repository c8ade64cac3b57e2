"""Ranks and counts of trained parameters, a row per run."""

from collections.abc import Mapping, Sequence
from typing import Any

from moadapt.reporting.markup import Markup, element
from moadapt.reporting.numerals import count, percent
from moadapt.reporting.palette import shade_of
from moadapt.reporting.section import nothing, section, swatch
from moadapt.reporting.wording import row_words

_PARTS = {"shared": "shared adapter", "experts": "experts", "router": "routers", "other": "other adapters"}


def parameters(runs: Sequence[Mapping[str, Any]]) -> Markup:
    """Return the section of the parameters.

    Args:
        runs: `run`, `shared`, `experts`, `router`, `other` and `ranks` by adapter.
    """
    if not runs:
        return section("parameters", "Ranks and parameters", nothing("No parameters have been counted yet."))
    note = (
        "A LoRA adapter of rank r adds to a weight matrix the product of two thin ones with r columns and r rows; the "
        "rank sets its size. Counted is what was trained, in single numbers."
    )
    heads = [*_PARTS.values(), "together"]
    table = element(
        "table",
        element(
            "thead",
            element(
                "tr",
                element("td"),
                element("th", "ranks", scope="col", class_="text"),
                *(element("th", head, scope="col") for head in heads),
            ),
        ),
        element("tbody", *map(_row, runs)),
    )
    return section("parameters", "Ranks and parameters", element("p", note), element("div", table, class_="wide"))


def _row(run: Mapping[str, Any]) -> Markup:
    name = str(run["run"])
    counts = [run.get(part) or 0 for part in _PARTS]
    ranks = [f"{adapter}\N{NO-BREAK SPACE}{rank}" for adapter, rank in (run.get("ranks") or {}).items()]
    return element(
        "tr",
        element("th", swatch(shade_of(name).variable), row_words(name).title, scope="row"),
        element("td", ", ".join(ranks) or "none", class_="text wrapped"),
        *(element("td", _share(number, sum(counts))) for number in counts),
        element("td", element("b", count(sum(counts)))),
    )


def _share(number: int, whole: int) -> str:
    return f"{count(number)} ({percent(number / whole, 0)})" if number and whole else "0"
