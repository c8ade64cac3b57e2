import json
from typing import Any

import pytest

from moadapt.picture import Picture
from moadapt.registry import TASKS
from moadapt.task import Example
from moadapt_tasks.nlvr2 import NLVR2
from tests.tasks.spoiled_folder import SIZE, Folder

Rows = list[dict[str, Any]]


def documents() -> Rows:
    def entry(identifier: str, sentence: str, label: str) -> dict[str, Any]:
        urls = {f"{side}_url": f"https://example.org/{side}.jpg" for side in ("left", "right")}
        judged = {"validation": {"5": label}, "writer": "8", "synset": "gorilla", "query": "gorillas1"}
        return {"identifier": identifier, "sentence": sentence, "label": label} | urls | judged

    return [
        entry("dev-850-0-0", "There is no more than {one} face.", "True"),
        entry("dev-850-0-1", "Señor left.", "False"),
        entry("dev-7-3-0", "Two dogs.", "False"),
    ]


@pytest.fixture
def task(folder: Folder) -> NLVR2:
    for name, mode in (
        ("dev-850-0-img0", "RGBA"),
        ("dev-850-0-img1", "L"),
        ("dev-7-3-img0", "P"),
        ("dev-7-3-img1", "1"),
    ):
        folder.picture(f"{name}.png", mode)
    return task_on(folder)


def task_on(folder: Folder, **changes: Any) -> NLVR2:
    files = {"statements": f"{folder.path}/{{split}}.json", "images": f"{folder.path}/{{directory}}/{{name}}.png"}
    return NLVR2(**files | {"splits": {"train": "train", "validation": "dev"}} | changes)


def write(folder: Folder, rows: Rows, split: str = "dev") -> None:
    (folder.path / f"{split}.json").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def test_nlvr2_is_registered() -> None:
    assert TASKS.get("nlvr2") is NLVR2


def test_read_returns_rows_of_two_pictures(folder: Folder, task: NLVR2) -> None:
    write(folder, documents())
    examples, bad = task.read("validation")
    assert bad == []
    assert examples[0] == Example(
        pictures=tuple(Picture(folder.path / f"dev-850-0-img{side}.png", SIZE) for side in (0, 1)),
        prompt="There is no more than {one} face. True or false?",
        answers=("true",),
        reference={"identifier": "dev-850-0-0", "label": "true"},
        entry=f"{folder.path}/dev.json: line 1",
    )
    assert [example.answers for example in examples[1:]] == [("false",), ("false",)]
    assert examples[1].pictures == examples[0].pictures


def test_read_finds_training_pictures_in_their_directories(folder: Folder, task: NLVR2) -> None:
    (folder.path / "69").mkdir()
    for side in (0, 1):
        folder.picture(f"69/train-10171-0-img{side}.png")
    row = documents()[0] | {"identifier": "train-10171-0-0", "directory": 69}
    write(folder, [row, row | {"identifier": "train-10171-0-1", "directory": 70}], "train")
    examples, bad = task.read("train")
    assert [picture.file.parent.name for picture in examples[0].pictures] == ["69", "69"]
    assert [(one.entry, "70/train-10171-0-img0.png does not exist" in one.reason) for one in bad] == [("line 2", True)]


def test_read_follows_the_settings(folder: Folder, task: NLVR2) -> None:
    write(folder, documents())
    changed = task_on(folder, prompt="Is it so? {sentence}", true_word="Yes", false_word="No", limit=2)
    examples, _ = changed.read("validation")
    assert [(example.prompt, example.answers) for example in examples] == [
        ("Is it so? There is no more than {one} face.", ("Yes",)),
        ("Is it so? Señor left.", ("No",)),
    ]
    assert [changed.parse(text, examples[0]) for text in ("yes", "No.", "true")] == ["true", "false", "true"]


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("true", "true"),
        (" True.\n", "true"),
        ("FALSE, as there are two", "false"),
        ("it is true", "it is true"),
        ("truest", "truest"),
        ("", ""),
        ("...", "..."),
    ],
)
def test_parse_takes_the_first_word(folder: Folder, task: NLVR2, text: str, meant: str) -> None:
    write(folder, documents())
    example = task.read("validation")[0][0]
    assert task.parse(text, example) == meant


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("sentence", " ", "its sentence is empty"),
        ("sentence", 3, "its sentence is 3; give a text"),
        ("label", "maybe", "its label is 'maybe'; give True or False"),
        ("label", True, "its label is True; give a text"),
        ("identifier", "dev-850", "its identifier is 'dev-850'; give split-set-pair-sentence"),
        ("identifier", "dev-850-0-", "its identifier is 'dev-850-0-'"),
        ("identifier", "dev-1-1-0", "its picture"),
        ("identifier", "dev-850-0-0", "its identifier 'dev-850-0-0' is that of an earlier entry"),
        ("identifier", None, "its identifier is None"),
        ("directory", 1.5, "its directory is 1.5"),
    ],
)
def test_read_reports_a_bad_statement(folder: Folder, task: NLVR2, key: str, value: Any, reason: str) -> None:
    rows = documents()
    rows[1][key] = value
    write(folder, rows)
    examples, bad = task.read("validation")
    assert [example.reference["identifier"] for example in examples] == ["dev-850-0-0", "dev-7-3-0"]
    assert [(one.entry, one.reason[: len(reason)]) for one in bad] == [("line 2", reason)]


def test_read_reports_a_missing_right_picture_and_a_broken_line(folder: Folder, task: NLVR2) -> None:
    write(folder, documents())
    (folder.path / "dev-850-0-img1.png").unlink()
    with (folder.path / "dev.json").open("a") as file:
        file.write('{"identifier": \n')
    examples, bad = task.read("validation")
    assert [example.reference["identifier"] for example in examples] == ["dev-7-3-0"]
    assert [one.entry for one in bad] == ["line 4", "line 1", "line 2"]
    assert all("dev-850-0-img1.png does not exist" in one.reason for one in bad[1:])


@pytest.mark.parametrize("words", [("true", "True."), ("", "false"), ("yes", "...")])
def test_nlvr2_refuses_answers_that_cannot_be_told_apart(folder: Folder, words: tuple[str, str]) -> None:
    with pytest.raises(ValueError, match="give two different words"):
        task_on(folder, true_word=words[0], false_word=words[1])


def test_right_answers_score_one(folder: Folder, task: NLVR2) -> None:
    write(folder, documents())
    examples, _ = task.read("validation")
    metric = task.metrics()["nlvr2"]
    written = [task.parse(f" {example.answers[0]}\n", example) for example in examples]
    metric.update(written, [example.reference for example in examples])
    assert {name: value.item() for name, value in metric.compute().items()} == {"accuracy": 1, "consistency": 1}
