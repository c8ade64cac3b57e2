import json
from typing import Any

import pytest

from moadapt.picture import Picture
from moadapt.registry import TASKS
from moadapt.task import Example
from moadapt_tasks.boxes.paligemma import PaliGemmaBoxes
from moadapt_tasks.grounding_jsonl import GroundingJSONLines
from tests.tasks.spoiled_folder import SIZE, Folder

Rows = list[dict[str, Any]]


def documents() -> Rows:
    def entry(image: str, expression: str, box: list[float]) -> dict[str, Any]:
        return {"image": f"data/coco/train2014/{image}", "sent": expression, "bbox": box, "height": 30, "width": 40}

    return [
        entry("cats.jpg", "left cat", [4, 3, 14, 15.5]),
        entry("cats.jpg", "the {black} señor", [20, 0, 40, 30]),
        entry("dog.jpg", "dog", [0, 0, 8, 6]),
    ]


@pytest.fixture
def task(folder: Folder) -> GroundingJSONLines:
    folder.picture("cats.jpg")
    folder.picture("dog.jpg")
    return task_on(folder)


def task_on(folder: Folder, **changes: Any) -> GroundingJSONLines:
    files = {"refs": f"{folder.path}/refcoco_{{split}}.jsonl", "images": f"{folder.path}/{{file_name}}"}
    return GroundingJSONLines(**files | {"splits": {"test": "testA"}} | changes)


def write(folder: Folder, rows: Rows) -> None:
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (folder.path / "refcoco_testA.jsonl").write_text(lines, encoding="utf-8")


def test_grounding_jsonl_is_registered() -> None:
    assert TASKS.get("grounding_jsonl") is GroundingJSONLines


def test_read_returns_one_row_a_line(folder: Folder, task: GroundingJSONLines) -> None:
    write(folder, documents())
    examples, bad = task.read("test")
    assert bad == []
    assert examples[0] == Example(
        pictures=(Picture(folder.path / "cats.jpg", SIZE),),
        prompt="where is left cat?",
        answers=("[100, 100, 350, 516]",),  # 4 / 40, 3 / 30, 14 / 40, 15.5 / 30 of 999
        reference=(4, 3, 14, 15.5),
        entry=f"{folder.path}/refcoco_testA.jsonl: line 1",
    )
    assert [example.prompt for example in examples[1:]] == ["where is the {black} señor?", "where is dog?"]


def test_read_follows_the_settings(folder: Folder, task: GroundingJSONLines) -> None:
    place = folder.path / "data/coco/train2014"
    place.mkdir(parents=True)
    folder.picture("data/coco/train2014/cats.jpg")
    rows = [{"img_path": row["image"], "expression": row["sent"], "bbox": row["bbox"]} for row in documents()]
    write(folder, rows)
    changed = task_on(
        folder,
        images=f"{folder.path}/{{image}}",
        image_field="img_path",
        expression_field="expression",
        prompt="detect {expression}",
        codec=PaliGemmaBoxes(),
        limit=1,
    )
    examples, _ = changed.read("test")
    assert [(example.prompt, example.pictures[0].file) for example in examples] == [
        ("detect left cat", place / "cats.jpg")
    ]
    assert examples[0].answers == (PaliGemmaBoxes().write([(4, 3, 14, 15.5)], SIZE, "left cat"),)


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("bbox", [14, 3, 4, 15], "its bbox goes from 14 to 4 and 3 to 15; give left, top, right, bottom"),
        ("bbox", [4, 3, 4, 15], "its bbox goes from 4 to 4"),
        ("bbox", [4, 3, 41, 15], "its bbox spans 4 to 41 and 3 to 15, outside its picture of 40 by 30 pixels"),
        ("bbox", [50, 3, 60, 15], "its bbox spans 50 to 60"),
        ("bbox", [4, 3, 10], "its bbox is [4, 3, 10]; give a list of 4 finite numbers"),
        ("bbox", [[4, 3, 10, 15]], "its bbox is [[4, 3, 10, 15]]"),
        ("bbox", [4, 3, 4.001, 15], "its box cannot be written: a box is too small"),
        ("sent", "", "its sent is empty"),
        ("sent", 7, "its sent is 7; give a text"),
        ("image", "gone.jpg", "its picture"),
        ("image", None, "its image is None"),
        ("width", 80, "its width is 80, but"),
        ("height", "30", "its height is '30', but"),
    ],
)
def test_read_reports_a_bad_row(folder: Folder, task: GroundingJSONLines, key: str, value: Any, reason: str) -> None:
    rows = documents()
    rows[1][key] = value
    write(folder, rows)
    examples, bad = task.read("test")
    assert [example.prompt for example in examples] == ["where is left cat?", "where is dog?"]
    assert [(one.entry, one.reason[: len(reason)]) for one in bad] == [("line 2", reason)]


@pytest.mark.parametrize("key", ["bbox", "sent", "image"])
def test_read_reports_a_row_that_lacks(folder: Folder, task: GroundingJSONLines, key: str) -> None:
    rows = documents()
    del rows[1][key]
    write(folder, rows)
    _, bad = task.read("test")
    assert [one.reason.split(";")[0] for one in bad] == [f"it has no '{key}'"]


def test_read_cuts_a_box_that_is_outside_by_rounding(folder: Folder, task: GroundingJSONLines) -> None:
    rows = documents()
    rows[0]["bbox"] = [-0.4, 3, 40.3, 30.2]
    write(folder, rows)
    examples, bad = task.read("test")
    assert (examples[0].reference, bad) == ((0, 3, 40, 30), [])


def test_right_answers_score_one(folder: Folder, task: GroundingJSONLines) -> None:
    write(folder, documents())
    examples, _ = task.read("test")
    metric = task.metrics()["box"]
    boxes = [task.parse(example.answers[0], example) for example in examples]
    assert task.parse("nowhere", examples[0]) is None
    metric.update(boxes, [example.reference for example in examples])
    assert metric.compute()[task.primary].item() == 1
