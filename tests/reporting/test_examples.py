from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from moadapt.reporting.cards import verdict
from moadapt.reporting.examples import examples
from tests.reporting.parsed_page import ParsedPage


@pytest.fixture
def image(tmp_path: Path) -> str:
    file = tmp_path / "picture.png"
    Image.new("RGB", (8, 6), "#102030").save(file)
    return str(file)


def example(image: str, said: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"task": "vqa", "images": [image], "prompt": "what?", "references": ["red"], "box": None} | {
        "predictions": said,
        **more,
    }


def answer(text: str, right: bool | None = None, box: list[float] | None = None) -> dict[str, Any]:
    return {"text": text, "right": right, "box": box}


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        (answer("red", True), "right"),
        (answer("red", False), "wrong"),
        (answer(" red "), "same"),
        (answer("blue"), ""),
    ],
)
def test_verdict(said: dict[str, Any], expected: str) -> None:
    assert verdict(example("", {"mixture": said}), "mixture") == expected
    assert verdict(example("", {}), "mixture") == ""


def test_equal_answers_share_a_line(image: str) -> None:
    said = {"base": answer("blue", False), "mixture": answer("red", True), "single_lora": answer("red", True)}
    page = ParsedPage(examples([example(image, said)]))
    lines = [line.words for line in page.all("tr")]
    assert lines == ["✗ blue", "✓ red"]
    names = [patch.attributes["aria-label"] for patch in page.all("span") if patch.attributes.get("role") == "img"]
    assert names == ["wrong", "base", "right", "mixture", "one LoRA"]


def test_what_the_mixture_got_wrong_comes_last_and_is_counted(image: str) -> None:
    shown = [
        example(image, {"mixture": answer("blue", False)}, prompt="first?"),
        example(image, {"mixture": answer("red", True)}, prompt="second?"),
        example(image, {"mixture": answer("red", True)}, prompt="third?"),
    ]
    page = ParsedPage(examples(shown))
    assert [prompt.words for prompt in page.all("p", "prompt")] == ["second?", "third?", "first?"]
    assert page.all("small")[0].words == "3 inputs; the mixture is right on 2 and wrong on 1"


def test_a_prompt_that_all_share_is_written_once(image: str) -> None:
    page = ParsedPage(examples([example(image, {}), example(image, {})]))
    assert page.all("p", "prompt") == []
    assert "all asked “what?”" in page.all("small")[0].words


def test_boxes_are_drawn_and_can_be_chosen(image: str) -> None:
    said = {"base": answer("nothing there", False), "mixture": answer("[0, 0, 500, 999]", True, [0, 0, 4, 6])}
    shown = example(image, said, task="grounding", box=[0, 0, 4, 3])
    page = ParsedPage(examples([shown]))
    lines = [box.attributes for box in page.all("rect", "line")]
    assert [(a["x"], a["y"], a["width"], a["height"]) for a in lines] == [("0", "0", "4", "6"), ("0", "0", "4", "3")]
    assert ["prediction" in a["class"] for a in lines] == [True, False]
    assert "of-1" in lines[0]["class"]
    buttons = page.all("input")
    assert [("pick-0" in b.attributes["class"], "checked" in b.attributes) for b in buttons] == [
        (True, False),
        (False, True),
    ]
    assert [line.words for line in page.all("tr")] == ["✗ base nothing there no box", "✓ mixture IoU 0.50"]
