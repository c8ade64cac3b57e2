from typing import Any

import pytest

from moadapt.picture import Picture
from moadapt.registry import TASKS
from moadapt_tasks.boxes import IntegerBoxes
from moadapt_tasks.visual7w_pointing import Visual7WPointing
from tests.tasks.spoiled_folder import SIZE, Folder

BOXES = {1: (0, 0, 10, 10), 2: (10, 10, 20, 10), 3: (-3, 20, 13, 14), 4: (30, 0, 10, 30)}
"""Left, top, width, height; the third reaches out of the picture, as some of the published ones do."""


def document() -> dict[str, Any]:
    def pair(qa_id: int, question: str, answer: int, *wrong: int) -> dict[str, Any]:
        ids = {"qa_id": qa_id, "image_id": 2358019, "type": "which"}
        return ids | {"question": question, "answer": answer, "multiple_choices": list(wrong)}

    pairs = [pair(1, "Which is {red}?", 1, 2, 3, 4), pair(2, "Which señor?", 4, 3, 2, 1), pair(3, "Which?", 3, 1, 2, 4)]
    image = {"image_id": 2358019, "filename": "v7w_2358019.jpg", "split": "val"}
    sides = ("x", "y", "width", "height")
    boxes = [
        {"box_id": name, "name": "cup", "image_id": 2358019} | dict(zip(sides, box, strict=True))
        for name, box in BOXES.items()
    ]
    return {"dataset": "visual7w-pointing", "images": [image | {"qa_pairs": pairs}], "boxes": boxes}


@pytest.fixture
def task(folder: Folder) -> Visual7WPointing:
    folder.picture("v7w_2358019.jpg")
    return task_on(folder)


def task_on(folder: Folder, **changes: Any) -> Visual7WPointing:
    files = {"questions": f"{folder.path}/dataset_v7w_pointing.json", "images": f"{folder.path}/{{filename}}"}
    return Visual7WPointing(**files | changes)


def write(folder: Folder, questions: Any) -> None:
    folder.write("dataset_v7w_pointing.json", questions)


def edges(name: int) -> tuple[float, float, float, float]:
    left, top, width, height = BOXES[name]
    return max(left, 0), max(top, 0), min(left + width, SIZE[0]), min(top + height, SIZE[1])


def text(name: int) -> str:
    return IntegerBoxes().write([edges(name)], SIZE, "")


def test_visual7w_pointing_is_registered() -> None:
    assert TASKS.get("visual7w_pointing") is Visual7WPointing


def test_read_answers_with_boxes_cut_to_their_picture(folder: Folder, task: Visual7WPointing) -> None:
    write(folder, document())
    examples, bad = task.read("validation")
    assert bad == []
    assert [example.answers for example in examples] == [(text(1),), (text(4),), (text(3),)]
    first = examples[0]
    assert first.pictures == (Picture(folder.path / "v7w_2358019.jpg", SIZE),)
    assert first.prompt == "Which is {red}?"
    place = "ABCD".index(first.reference["right"])
    assert first.reference["options"][place] == text(1)
    assert first.reference["boxes"][place] == edges(1)
    assert set(first.reference["boxes"]) == {edges(name) for name in BOXES}


def test_read_answers_with_letters(folder: Folder, task: Visual7WPointing) -> None:
    write(folder, document())
    changed = task_on(folder, answer="letter", prompt="{question}\n{options}", limit=2)
    examples, _ = changed.read("validation")
    assert len(examples) == 2
    assert f"\n{examples[0].answers[0]}. {text(1)}" in examples[0].prompt
    assert [changed.parse(f"({each.answers[0]})", each) for each in examples] == [each.answers[0] for each in examples]
    assert changed.parse(text(1), examples[0]) == examples[0].answers[0]


@pytest.mark.parametrize(
    ("written", "chosen"),
    [
        ("it is [0, 0, 260, 340]", 1),  # most of box 1
        ("[700, 10, 999, 990]", 4),
        (text(3), 3),
        ("nowhere", None),
        ("[600, 700, 650, 990]", None),  # overlaps none
    ],
)
def test_a_box_chooses_the_option_that_it_overlaps_most(
    folder: Folder, task: Visual7WPointing, written: str, chosen: int | None
) -> None:
    write(folder, document())
    example = task.read("validation")[0][0]
    letter = "" if chosen is None else "ABCD"[example.reference["boxes"].index(edges(chosen))]
    assert task.parse(written, example) == letter


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("question", "", "its question is empty"),
        ("answer", 9, "its answer 9 is unknown to"),
        ("answer", "4", "its answer '4' is unknown to"),
        ("answer", None, "its answer is None"),
        ("multiple_choices", [1, 2, 9], "its multiple_choices 9 is unknown to"),
        ("multiple_choices", [], "it has 1 answers to choose from"),
        ("multiple_choices", [None], "its multiple_choices is None"),
        ("qa_id", 1, "its qa_id 1 is that of an earlier entry"),
    ],
)
def test_read_reports_a_bad_question(folder: Folder, task: Visual7WPointing, key: str, value: Any, reason: str) -> None:
    questions = document()
    questions["images"][0]["qa_pairs"][1][key] = value
    write(folder, questions)
    examples, bad = task.read("validation")
    assert [example.entry.rsplit(" ", 1)[1] for example in examples] == ["1", "3"]
    assert [one.reason[: len(reason)] for one in bad] == [reason]


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("x", 45, "its box spans 45 to 55 and 0 to 30, outside its picture of 40 by 30 pixels"),
        ("x", "30", "its x is '30'; give a finite number"),
        ("width", 0, "it is 0 wide and 30 high"),
        ("height", -1, "it is 10 wide and -1 high"),
        ("width", 0.001, "its box cannot be written: a box is too small"),
    ],
)
def test_read_reports_a_bad_box_once(folder: Folder, task: Visual7WPointing, key: str, value: Any, reason: str) -> None:
    questions = document()
    questions["boxes"][3][key] = value
    write(folder, questions)
    examples, bad = task.read("validation")
    assert examples == []  # each question has it among its choices
    assert [(one.entry, one.reason[: len(reason)]) for one in bad] == [("box_id 4", reason)]


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"answer": "letter"}, r"write {options} into it"),
        ({"answer": "text"}, "`answer` is 'text'; give box or letter"),
        ({"prompt": "point"}, "`prompt` is 'point'"),
        ({"splits": {"train": "train"}}, "`splits` gives 'train' for train"),
    ],
)
def test_visual7w_pointing_refuses(folder: Folder, changes: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        task_on(folder, **changes)


def test_right_answers_score_one(folder: Folder, task: Visual7WPointing) -> None:
    write(folder, document())
    examples, _ = task.read("validation")
    metric = task.metrics()[task.primary]
    metric.update(
        [task.parse(example.answers[0], example) for example in examples], [example.reference for example in examples]
    )
    assert metric.compute().item() == 1
