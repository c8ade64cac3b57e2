from typing import Any

from moadapt.reporting.columns import COLUMNS
from moadapt.reporting.results import results
from tests.reporting.parsed_page import ParsedPage


def row(name: str, accuracy: float | None = None, **more: Any) -> dict[str, Any]:
    return {"name": name, "vqa": {} if accuracy is None else {"accuracy": accuracy}, **more}


def best(rows: list[dict[str, Any]]) -> list[str]:
    return [mark.words for mark in ParsedPage(results(rows)).all("b")]


def test_best_score_is_the_highest() -> None:
    assert best([row("base", 0.1), row("single_lora", 0.7), row("mixture", 0.812)]) == ["81.2"]


def test_scores_that_look_equal_are_both_best() -> None:
    assert best([row("single_lora", 0.8121), row("mixture", 0.8124), row("base", 0.811)]) == ["81.2", "81.2"]


def test_a_single_row_is_not_the_best_of_anything() -> None:
    assert best([row("mixture", 0.8)]) == []


def test_best_cost_is_the_lowest_of_what_was_trained() -> None:
    rows = [
        row("base", trainable_parameters=0, step_ratio=1.0),
        row("single_lora", trainable_parameters=1200, step_ratio=1.3),
        row("mixture", trainable_parameters=1100, step_ratio=1.4),
        row("mixture_merged", trainable_parameters=0, step_ratio=None),
    ]
    assert best(rows) == ["1.30", "1 100"]


def test_both_spellings_of_bleu_are_read() -> None:
    column = next(column for column in COLUMNS if "bleu4" in column.keys)
    assert column.value({"captioning": {"bleu4": 0.25}}) == 0.25
    assert column.value({"captioning": {"bleu_4": 0.5}}) == 0.5


def test_bars_are_shares_of_the_full_scale() -> None:
    page = ParsedPage(results([{"name": "mixture", "captioning": {"cider_d": 2.5}, "vqa": {"accuracy": 0.75}}]))
    shares = [cell.attributes["style"].split(";")[0] for cell in page.all("td", "scored")]
    assert shares == ["--share:0.7500", "--share:0.2500"]


def test_differences_are_in_points_and_signed() -> None:
    page = ParsedPage(results([row("base", 0.25), row("mixture", 0.75), row("mixture_merged", 0.7)]))
    table = page.all("table", "narrow")[0].words
    assert "Mixture against the untrained base +50.0" in table
    assert "Merged, one model, against the mixture \N{MINUS SIGN}5.0" in table
    assert "one LoRA" not in table
