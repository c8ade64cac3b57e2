"""The page of one merge: what it is, how far each site is off, and what cutting it to a rank leaves out."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes

from moadapt.reporting.chart import chart
from moadapt.reporting.document import write_document
from moadapt.reporting.markup import Markup, element
from moadapt.reporting.merges import merges
from moadapt.reporting.numerals import fixed
from moadapt.reporting.palette import shade_of
from moadapt.reporting.section import figure, figures, nothing, section

_ROW = "mixture_merged"


def write_merge_page(report: Mapping[str, Any], file: Path, *, title: str) -> None:
    """Write the page of a merge.

    Args:
        report: What `MergeReport.to_json` gives.
        file: Where to write it; replaced at once where it exists.
        title: Its heading.
    """
    served = ", ".join(report.get("tasks") or ())
    row = "mixture_merged_per_task" if served else _ROW
    errors = {**(report.get("sites") or {}), **(report.get("outputs") or {})}  # of outputs where they are known
    told = {**report, "row": row, "task": served or None, "sites": errors}
    sections = {
        "merges": ("Errors", merges([told])),
        "ranks": ("Ranks", _ranks(report.get("curve") or (), report.get("rank"))),
        "scores": ("Scores", _scores(report.get("before") or {}, report.get("after") or {})),
    }
    exact = "This merge is exact" if report.get("exact") else "This merge is not exact"
    opening = section("about", "What this is", element("p", f"{exact}: {report.get('why')}."))
    write_document(file, title, sections, opening)


def _ranks(curve: Sequence[float], rank: int | None) -> Markup:
    if not curve:
        return section("ranks", "What ranks leave out", nothing("The merge was not cut to a rank."))

    def draw(axes: Axes) -> None:
        axes.plot(range(len(curve)), curve, color=shade_of(_ROW).light)
        if rank is not None and rank < len(curve):
            axes.plot([rank], [curve[rank]], "o", color=shade_of(_ROW).light)
        axes.set_ylim(0, 1.04)
        axes.set_xlabel("rank")
        axes.set_ylabel("left out")
        axes.grid(True)

    drawn = chart(draw, width=420, height=240, name="ranks", label="What each rank leaves out of the merged changes")
    note = f"Root of the share of squares that rank r leaves out of all merged changes; the dot is rank {rank}."
    return section("ranks", "What ranks leave out", figures(figure(drawn, note)))


def _scores(before: Mapping[str, float], after: Mapping[str, float]) -> Markup:
    if not before:
        return section("scores", "Scores", nothing("No rows were answered before and after."))
    head = element("tr", element("td"), *(element("th", words, scope="col") for words in ("mixture", "merged")))
    rows = [
        element(
            "tr", element("th", name, scope="row"), element("td", fixed(value, 3)), element("td", fixed(after[name], 3))
        )
        for name, value in before.items()
    ]
    table = element("table", element("thead", head), element("tbody", *rows), class_="narrow")
    return section("scores", "Scores", element("div", table, class_="wide"))
