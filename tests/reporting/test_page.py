import copy
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from moadapt.reporting import write_report
from moadapt.reporting.wording import row_words
from tests.reporting.fake_details import ROWS, TASKS, fake_details
from tests.reporting.parsed_page import ParsedPage

HOSTILE = "</title></style></svg><script>alert(1)</script><img src=x onerror='alert(1)'>\"&$x_1$"
SECTIONS = {
    "rows": "results",
    "examples": "examples",
    "routing": "routing",
    "losses": "losses",
    "parameters": "parameters",
    "merges": "merges",
    "settings": "settings",
}


@pytest.fixture(scope="module")
def details(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return fake_details(tmp_path_factory.mktemp("pictures"), steps=40, layers=2, each=3)


@pytest.fixture(scope="module")
def page(details: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> str:
    return written(details, tmp_path_factory.mktemp("page") / "report.html")


def written(details: dict[str, Any], file: Path) -> str:
    write_report(details, file)
    return file.read_text(encoding="utf-8")


def spoiled(value: Any) -> Any:
    """The same structure with something hostile in every text but the names of files."""
    if isinstance(value, str):
        return value if value.endswith(".png") else value + HOSTILE
    if isinstance(value, list):
        return [spoiled(item) for item in value]
    if isinstance(value, dict):
        return {name: spoiled(item) for name, item in value.items()}
    return value


def test_page_is_well_formed_and_its_addresses_are_unique(page: str) -> None:
    parsed = ParsedPage(page)
    assert page.startswith("<!DOCTYPE html>")
    identities = Counter(e.attributes["id"] for e in parsed.elements if "id" in e.attributes)
    assert [name for name, times in identities.items() if times > 1] == []
    for link in parsed.all("a") + parsed.all("use"):
        address = link.attributes.get("href") or link.attributes["xlink:href"]
        assert address.removeprefix("#") in identities
    for name in re.findall(r"url\(#([^)]*)\)", page):
        assert name in identities


def test_page_loads_nothing_from_outside(page: str) -> None:
    parsed = ParsedPage(page)
    for element in parsed.elements:
        for name in ("href", "xlink:href", "src", "srcset", "action", "data", "poster"):
            value = element.attributes.get(name, "#")
            assert value.startswith(("#", "data:image/png;base64,")), (element.tag, name, value)
    assert not {"script", "link", "iframe", "object", "embed", "base"} & {e.tag for e in parsed.elements}
    assert "http:" not in page
    assert "https:" not in page
    assert "@import" not in page
    assert set(re.findall(r"url\((.)", page)) <= {"#"}


def test_page_has_every_row_example_and_part(page: str, details: dict[str, Any]) -> None:
    parsed = ParsedPage(page)
    heads = [head.words for head in parsed.all("th")]
    for name in ROWS:
        assert row_words(name).title in heads
        assert name in [code.words for code in parsed.all("code")]
    shown = parsed.section("examples").words
    for example in details["examples"]:
        assert example["prompt"] in shown
        for reference in example["references"] if example["box"] is None else []:
            assert reference in shown
        for prediction in example["predictions"].values():
            assert example["box"] is not None or prediction["text"] in shown
    assert len(parsed.all("article")) == len(details["examples"])
    assert len(parsed.all("image")) == len(details["examples"])
    charts = [chart.attributes["aria-label"] for chart in parsed.all("svg", "chart")]
    assert len(charts) == len(TASKS) + 4 + len(details["merges"])
    assert details["command"] in parsed.section("settings").words
    for name in details["settings"]:
        assert name in [term.words for term in parsed.all("dt")]


def test_hostile_text_everywhere_stays_text(page: str, details: dict[str, Any], tmp_path: Path) -> None:
    hostile = spoiled(details)
    for part in ("settings", "losses"):
        hostile[part] = {name + HOSTILE: value for name, value in hostile[part].items()}
    hostile["losses"] = {run: {t + HOSTILE: p for t, p in c.items()} for run, c in hostile["losses"].items()}
    for merge in hostile["merges"]:
        merge["sites"] = {site + HOSTILE: error for site, error in merge["sites"].items()}
    for example in hostile["examples"]:
        example["predictions"] = {row + HOSTILE: said for row, said in example["predictions"].items()}
    parsed = ParsedPage(written(hostile, tmp_path / "report.html"))
    assert {element.tag for element in parsed.elements} <= {element.tag for element in ParsedPage(page).elements}
    assert not any(name.startswith("on") for element in parsed.elements for name in element.attributes)
    assert HOSTILE in parsed.all("title")[0].words
    assert HOSTILE in parsed.section("examples").words
    assert HOSTILE in parsed.section("merges").words


@pytest.mark.parametrize("empty", [None, "missing", "empty"])
@pytest.mark.parametrize("part", list(SECTIONS))
def test_a_part_that_is_not_there_is_said(part: str, empty: str | None, tmp_path: Path) -> None:
    details = fake_details(tmp_path, steps=4, layers=1, each=1)
    details = {"settings": {"steps": 4}, "rows": details["rows"][:1], part: details[part]}
    if empty == "missing":
        del details[part]
    else:
        details[part] = None if empty is None else type(details[part])()
    parsed = ParsedPage(written(details, tmp_path / "report.html"))
    section = parsed.section(SECTIONS[part])
    assert any(note.words in section.words for note in parsed.all("p", "nothing"))


def test_nothing_at_all_makes_a_page(tmp_path: Path) -> None:
    parsed = ParsedPage(written({}, tmp_path / "report.html"))
    assert len(parsed.all("p", "nothing")) == len(SECTIONS)


def test_parts_of_an_interrupted_run_make_a_page(details: dict[str, Any], tmp_path: Path) -> None:
    early = copy.deepcopy(details)
    early["rows"] = [{"name": "base"}, {"name": "mixture", "vqa": {"accuracy": float("nan")}, "captioning": None}]
    early["losses"] = {"single_lora": {"all": [], "vqa": [[1, float("nan")]]}, "mixture": {"all": [[1, 2.0]]}}
    early["routing"]["weights"] = []
    early["merges"] = [{"row": "mixture_merged", "method": "mean_routing", "task": None, "exact": False}]
    early["examples"] = [{"task": "vqa", "prompt": "why?"}, {**early["examples"][-1], "images": ["gone.png"]}]
    early["parameters"] = [{"run": "mixture"}]
    parsed = ParsedPage(written(early, tmp_path / "report.html"))
    assert "picture not found: gone.png" in parsed.section("examples").words
    assert len(parsed.all("svg", "chart")) == 1


def test_page_replaces_an_older_one_and_leaves_no_other_file(tmp_path: Path) -> None:
    file = tmp_path / "runs" / "report.html"
    write_report({"title": "first"}, file)
    write_report({"title": "second"}, file)
    assert ParsedPage(file.read_text(encoding="utf-8")).all("h1")[0].words == "second"
    assert list(file.parent.iterdir()) == [file]


def test_same_details_make_the_same_page(details: dict[str, Any], page: str, tmp_path: Path) -> None:
    assert written(details, tmp_path / "report.html") == page


def test_page_says_what_the_data_are_where_details_do(tmp_path: Path) -> None:
    parsed = ParsedPage(written({"about": "Digits on dark ground."}, tmp_path / "report.html"))
    assert "Digits on dark ground." in parsed.section("about").words


@pytest.mark.parametrize(("router", "told"), [("softmax", True), ("by_task", False)])
def test_page_says_that_a_learned_router_is_not_told_the_task(router: str, told: bool, tmp_path: Path) -> None:
    parsed = ParsedPage(written({"settings": {"router": router}}, tmp_path / "report.html"))
    assert ("not told its task" in parsed.section("about").words) is told
