"""The page of a run: well formed whatever names the data has, and true to the numbers that it is made from."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from moadapt.reporting.expert_use import expert_use, task_table
from moadapt.reporting.routed_examples import routed_examples
from moadapt.reporting.run_page import write_run_report
from tests.reporting.parsed_page import ParsedPage
from tests.reporting.test_page import HOSTILE

EXPERTS = ["vqa", "captioning", "third"]


def values(load: list[float], **other: Any) -> dict[str, Any]:
    numbers = {"entropy": 0.5, "effective_experts": 1.5, "dead_experts": 1 / 3, "drift": None, **other}
    by_task = [load, load[::-1], [None] * 3]
    return {"load": load, "load_by_task": by_task, "load_by_modality": [load, [None] * 3], **numbers}


def record() -> dict[str, Any]:
    places = {"language.0": values([0.6, 0.38, 0.02]), "language.1": values([0.4, 0.3, 0.3])}
    return {"step": 40, "experts": EXPERTS, "tasks": ["vqa", "captioning", "unseen"], "means": {}, "places": places}


def example(folder: Path, *, words: bool = True) -> dict[str, Any]:
    file = folder / "picture.png"
    Image.new("RGB", (20, 20), "navy").save(file)
    tokens = [{"text": "<image>", "image": True}] * 4 + [{"text": text, "image": False} for text in ("what", " is\n")]
    sure = [[0.9, 0.1, 0.0], [0.1, 0.9, 0.0], [0.0, 0.2, 0.8], [0.4, 0.3, 0.3]]
    places: list[dict[str, Any]] = [{"name": "model", "shares": [0.5, 0.25, 0.25]}]
    places += [{"name": "language.0", "words": True, "weights": [*sure, [1.0, 0, 0], [0, 1.0, 0]]}] if words else []
    places += [{"name": "vision.0", "words": False, "weights": [[0.2, 0.2, 0.6], *sure]}]
    return {
        "task": "vqa",
        "images": [str(file)],
        "prompt": "what is?",
        "answers": ["it"],
        "tokens": tokens,
        "places": places,
    }


def details(folder: Path) -> dict[str, Any]:
    curve = [[10, 0.4], [20, 0.3]]
    return {
        "title": "run", "about": ["A run."], "scores": {"score": 0.5}, "experts": EXPERTS, "record": record(),
        "curves": {"entropy": {"": curve, "language.0": curve}, "new measure": {"": curve}},
        "objectives": {"prior": curve}, "losses": {"mixture": {"all": curve}},
        "examples": [example(folder), example(folder)],
        "predictions": [{"task": "vqa", "prompt": "what?", "text": "so", "reference": ["so", "so", "no"]}],
        "settings": {"seed": 1}, "command": "moadapt report run",
    }  # fmt: skip


def spoiled(value: Any) -> Any:
    """The same with something hostile in every text and name that data may hold."""
    if isinstance(value, str):
        return value if value.endswith(".png") else value + HOSTILE
    if isinstance(value, list):
        return [spoiled(item) for item in value]
    return {name: spoiled(item) for name, item in value.items()} if isinstance(value, dict) else value


@pytest.mark.parametrize("hostile", [False, True])
def test_page_is_well_formed_and_loads_nothing(tmp_path: Path, hostile: bool) -> None:
    given = details(tmp_path)
    if hostile:
        for part in ("title", "about", "examples", "predictions", "settings", "command", "experts"):
            given[part] = spoiled(given[part])
        given["record"]["experts"] = given["experts"]
    write_run_report(given, tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    page = ParsedPage(text)
    identities = Counter(e.attributes["id"] for e in page.elements if "id" in e.attributes)
    assert [name for name, times in identities.items() if times > 1] == []
    for link in page.all("a") + page.all("use"):
        assert (link.attributes.get("href") or link.attributes["xlink:href"]).removeprefix("#") in identities
    assert not {"script", "link", "iframe"} & {e.tag for e in page.elements}
    assert [section.attributes["id"] for section in page.all("section")] == [
        "about", "routing", "use", "inputs", "curves", "losses", "answers", "settings"
    ]  # fmt: skip


def test_a_run_without_experts_has_no_section_on_them(tmp_path: Path) -> None:
    write_run_report({**details(tmp_path), "experts": []}, tmp_path / "report.html")
    page = ParsedPage((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert [section.attributes["id"] for section in page.all("section")] == ["about", "losses", "answers", "settings"]


def test_use_names_the_dead_and_shows_what_is_known() -> None:
    page = ParsedPage(expert_use(record()))
    assert "less than 3.3 % of the weight: third at language.0." in page.all("p", "finding")[0].words
    assert [caption.words for caption in page.all("figcaption")] == [
        "All inputs", "Text tokens", "Tasks against experts, mean over places"
    ]  # fmt: skip
    heads = [head.words for head in page.all("th")]
    assert heads == ["place", "effective experts", "entropy, nats", "dead", "language.0", "language.1"]  # no drift yet


def test_tasks_that_were_not_seen_are_left_out() -> None:
    table = task_table(record())
    assert (table["tasks"], table["places"]) == (["vqa", "captioning"], ["language.0", "language.1"])
    assert table["weights"][0] == [[0.6, 0.38, 0.02], [0.02, 0.38, 0.6]]
    assert task_table({})["places"] == []


def test_patches_and_words_have_the_colour_of_their_expert(tmp_path: Path) -> None:
    page = ParsedPage(routed_examples([example(tmp_path)], EXPERTS))
    patches = page.all("rect")
    assert len(patches) == 4 + 4  # of the language tower, and of the vision tower without its class token
    assert [patch.attributes["style"].split(")")[0] for patch in patches[:4]] == [
        f"fill:var(--expert-{index}" for index in (0, 1, 2, 0)
    ]
    assert [float(patch.attributes["x"]) for patch in patches[:4]] == [0, 10, 0, 10]
    strengths = [float(patch.attributes["style"].rpartition(":")[2]) for patch in patches[:4]]
    assert strengths[0] == strengths[1] > strengths[2] > strengths[3]
    words = {word.words: word.attributes["style"] for word in page.all("span") if "style" in word.attributes}
    assert "--expert-0) 65%" in words["what"]
    assert "--expert-1) 65%" in words["is↵"]
    widths = [bar.attributes["style"].partition(";")[0] for bar in page.all("i") if "width" in str(bar.attributes)]
    assert widths == ["width:50.00%", "width:25.00%", "width:25.00%"]


def test_patches_without_a_grid_stand_in_a_row(tmp_path: Path) -> None:
    given = example(tmp_path, words=False)
    given["places"] = [{"name": "vision.0", "words": False, "weights": [[1.0, 0, 0]] * 15}]
    page = ParsedPage(routed_examples([given], EXPERTS))
    assert (len(page.all("rect")), len(page.all("i")) - len(EXPERTS)) == (0, 15)


def test_a_picture_that_is_gone_leaves_a_note(tmp_path: Path) -> None:
    page = ParsedPage(routed_examples([{**example(tmp_path), "images": ["gone.png"]}], EXPERTS))
    assert page.all("div", "lost")[0].words == "picture not found: gone.png"
    assert page.all("use") == []
