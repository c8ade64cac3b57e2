"""The page of one merge."""

from pathlib import Path
from typing import Any

from moadapt.reporting.merge_page import write_merge_page
from tests.reporting.parsed_page import ParsedPage


def page(tmp_path: Path, **report: Any) -> ParsedPage:
    told = {"method": "ties", "tasks": [], "exact": False, "why": "a <reason>", "sites": {"a.b": 0.217}, **report}
    write_merge_page(told, tmp_path / "page.html", title="one merge")
    return ParsedPage((tmp_path / "page.html").read_text())


def test_it_says_why_and_draws_what_outputs_lose_where_that_is_known(tmp_path: Path) -> None:
    found = page(tmp_path, outputs={"a.b": 0.4})
    assert "This merge is not exact: a <reason>." in found.section("about").words
    assert "0.4" in found.section("merges").words
    assert "0.22" not in found.section("merges").words
    assert len(found.all("svg")) == 1


def test_ranks_and_scores_are_shown_where_there_are_any(tmp_path: Path) -> None:
    empty = page(tmp_path)
    assert "was not cut" in empty.section("ranks").words
    assert "No rows were answered" in empty.section("scores").words
    found = page(tmp_path, rank=1, curve=[1.0, 0.3, 0.0], before={"vqa/accuracy": 0.75}, after={"vqa/accuracy": 0.5})
    assert len(found.all("svg")) == 2
    assert "vqa/accuracy 0.750 0.500" in found.section("scores").words
