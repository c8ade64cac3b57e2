from typing import Any

from moadapt.reporting.merges import merges
from tests.reporting.parsed_page import ParsedPage


def report(**more: Any) -> dict[str, Any]:
    return {"row": "mixture_merged", "method": "mean_routing", "task": None, "exact": False, **more}


def test_table_has_mean_and_worst_error_and_divergence() -> None:
    sites = {"layers.0": 0.1, "layers.1": 0.3}
    page = ParsedPage(merges([report(sites=sites, output_kl=0.0123, top1=0.875, held_out=True, rows=48)]))
    cells = [cell.words for cell in page.all("td")]
    assert cells[1:] == ["all tasks", "mean_routing", "no", "0.2", "0.3", "0.012", "87.5%", "48", "held-out"]


def test_an_exact_merge_has_no_chart() -> None:
    page = ParsedPage(merges([report(exact=True, sites={"layers.0": 1e-8}, output_kl=0.0)]))
    assert page.all("svg") == []
    assert "yes" in [cell.words for cell in page.all("td")]


def test_only_the_worst_of_many_sites_are_drawn_in_the_order_of_the_model() -> None:
    sites = {f"site{n:03d}": n / 1000 for n in range(100)}
    page = ParsedPage(merges([report(sites=sites)]))
    chart = page.all("svg")[0].words
    drawn = [site for site in sites if site in chart]
    assert drawn == [f"site{n:03d}" for n in range(58, 100)]
    assert chart.index("site058") < chart.index("site099")
    assert "42 worst of 100 sites" in page.all("figcaption")[0].words


def test_a_merge_without_calibration_says_nothing_about_divergence() -> None:
    cells = [cell.words for cell in ParsedPage(merges([report(sites={}, output_kl=None)])).all("td")]
    assert cells[-5:] == ["\N{EN DASH}"] * 5
