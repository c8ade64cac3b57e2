"""What merging lost: a table of the merges, and the error at each site as bars."""

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from matplotlib.axes import Axes

from moadapt.reporting.chart import chart
from moadapt.reporting.markup import Markup, element
from moadapt.reporting.numerals import MISSING, count, known, small
from moadapt.reporting.palette import shade_of
from moadapt.reporting.paths import shortened
from moadapt.reporting.section import figure, figures, nothing, section, swatch
from moadapt.reporting.wording import row_words

_MOST_SITES = 42
_BAR = 15


def merges(reports: Sequence[Mapping[str, Any]]) -> Markup:
    """Return the section of the merges.

    Args:
        reports: One a merge: `row`, `method`, `task`, `exact`, `sites`, `output_kl`, `top1`, `held_out`, `rows`.
    """
    if not reports:
        return section("merges", "What merging lost", nothing("Nothing has been merged yet."))
    note = (
        "A router may weigh experts anew for each input; a merged model has one fixed set of weights. A site is a "
        "weight matrix that carries adapters. Its error is the distance between what the merged and the routed change "
        "of that matrix give on calibration rows, relative to the latter: 0 is the same, 1 as far off as no change at "
        "all. The output divergence says how far the merged model's predictions are from the routed one's "
        "(Kullback-Leibler, nats per token; 0 is the same), and beside it stands how often both find the same token "
        "the likeliest."
    )
    top = max((error for report in reports for error in _errors(report).values()), default=0.0)
    charts = [_bars(f"merge-{index}", report, top) for index, report in enumerate(reports) if _drawn(report)]
    return section(
        "merges",
        "What merging lost",
        element("p", note),
        element("div", _table(reports), class_="wide"),
        figures(*charts),
    )


def _errors(report: Mapping[str, Any]) -> dict[str, float]:
    return {site: float(error) for site, error in (report.get("sites") or {}).items() if known(error)}


def _drawn(report: Mapping[str, Any]) -> bool:
    return not report.get("exact") and bool(_errors(report))


def _table(reports: Sequence[Mapping[str, Any]]) -> Markup:
    texts = [element("th", head, scope="col", class_="text") for head in ("for", "method", "exact")]
    heads = [element("th", head, scope="col") for head in ("mean site error", "worst site error", "output divergence")]
    heads.append(element("th", "same predictions", scope="col"))
    heads.append(element("th", "calibration rows", scope="col"))
    last = element("th", "measured on", scope="col", class_="text")
    return element(
        "table",
        element("thead", element("tr", element("td"), *texts, *heads, last)),
        element("tbody", *map(_row, reports)),
    )


def _row(report: Mapping[str, Any]) -> Markup:
    errors = list(_errors(report).values())
    seen = "held-out" if report.get("held_out") else "the same"
    row = str(report["row"])
    return element(
        "tr",
        element("th", swatch(shade_of(row).variable), row_words(row).title, scope="row"),
        element("td", str(report.get("task") or "all tasks"), class_="text"),
        element("td", element("code", str(report.get("method"))), class_="text"),
        element("td", "yes" if report.get("exact") else "no", class_="text"),
        element("td", small(fmean(errors)) if errors else small(None)),
        element("td", small(max(errors)) if errors else small(None)),
        element("td", small(report.get("output_kl"))),
        element("td", MISSING if report.get("top1") is None else f"{report['top1']:.1%}"),
        element("td", count(report.get("rows"))),
        element("td", MISSING if report.get("output_kl") is None else seen, class_="text"),
    )


def _bars(name: str, report: Mapping[str, Any], top: float) -> Markup:
    errors = _errors(report)
    worst = sorted(errors, key=lambda site: -errors[site])[:_MOST_SITES]
    sites = [site for site in errors if site in set(worst)]
    row = str(report["row"])

    def draw(axes: Axes) -> None:
        axes.barh(range(len(sites)), [errors[site] for site in sites], height=0.72, color=shade_of(row).light)
        axes.set_yticks(range(len(sites)), shortened(sites), size=10)
        axes.set_ylim(len(sites) - 0.4, -0.6)
        axes.set_xlim(0, 1.04 * top or 1)
        axes.tick_params(axis="y", length=0)
        axes.grid(True, axis="x")
        axes.set_xlabel("relative error")

    cut = f"; the {len(sites)} worst of {len(errors)} sites" if len(sites) < len(errors) else ""
    served = report.get("task") or "all tasks"
    caption = f"{row_words(row).short}: {served}{cut}"
    label = f"Relative error of each site, merge {report.get('method')} for {served}"
    return figure(chart(draw, width=260, height=_BAR * len(sites) + 48, name=name, label=label), caption)
