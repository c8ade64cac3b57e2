from typing import Any

import pytest

from moadapt.picture import Picture
from moadapt.registry import TASKS
from moadapt.task import Example
from moadapt_tasks.vizwiz import VizWiz
from tests.tasks.spoiled_folder import SIZE, Folder

ANSWERS = ["unanswerable"] * 6 + ["soda"] * 2 + ["coca cola", "Coke™"]


def document() -> list[dict[str, Any]]:
    def entry(number: int, question: str, answers: list[str]) -> dict[str, Any]:
        return {
            "answer_type": "other",
            "answerable": 1,
            "image": f"VizWiz_val_{number:08d}.jpg",
            "question": question,
            "answers": [{"answer_confidence": "maybe", "answer": answer} for answer in answers],
        }

    return [
        entry(0, "Ok. There is another {picture} I hope it is a better one.", ANSWERS),
        entry(1, "What is this?", ["key fob"] * 10),
        entry(2, "Qué es? ¿Señal?", ["Tür"] * 10),
    ]


@pytest.fixture
def task(folder: Folder) -> VizWiz:
    for number in range(3):
        folder.picture(f"VizWiz_val_{number:08d}.jpg")
    return task_on(folder)


def task_on(folder: Folder, **changes: Any) -> VizWiz:
    files = {"questions": f"{folder.path}/{{split}}.json", "images": f"{folder.path}/{{image}}"}
    return VizWiz(**files | {"splits": {"validation": "val"}} | changes)


def test_vizwiz_is_registered() -> None:
    assert TASKS.get("vizwiz") is VizWiz


def test_read_returns_the_rows_of_a_split(folder: Folder, task: VizWiz) -> None:
    folder.write("val.json", document())
    examples, bad = task.read("validation")
    assert bad == []
    assert examples[0] == Example(
        pictures=(Picture(folder.path / "VizWiz_val_00000000.jpg", SIZE),),
        prompt="Ok. There is another {picture} I hope it is a better one.",
        answers=("unanswerable",),
        reference=ANSWERS,
        entry=f"{folder.path}/val.json: image 'VizWiz_val_00000000.jpg'",
    )
    assert (examples[2].prompt, examples[2].answers) == ("Qué es? ¿Señal?", ("Tür",))


def test_read_follows_the_settings(folder: Folder, task: VizWiz) -> None:
    folder.write("val.json", document())
    examples, _ = task_on(folder, limit=1, prompt="Q: {question}", train_answers="all").read("validation")
    assert [(example.prompt[:6], example.answers) for example in examples] == [("Q: Ok.", tuple(ANSWERS))]


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("question", "", "its question is empty"),
        ("question", 7, "its question is 7; give a text"),
        ("image", "gone.jpg", "its picture"),
        ("image", None, "its image is None"),
        ("image", "VizWiz_val_00000000.jpg", "its image 'VizWiz_val_00000000.jpg' is that of an earlier entry"),
        ("answers", [], "its answers is []; give a list with at least one object"),
        ("answers", [{"answer": ""}], "its answer is empty"),
        ("answers", ["yes"], "it is 'yes'; give a JSON object"),
    ],
)
def test_read_reports_a_bad_question(folder: Folder, task: VizWiz, key: str, value: Any, reason: str) -> None:
    questions = document()
    questions[1][key] = value
    folder.write("val.json", questions)
    examples, bad = task.read("validation")
    assert [example.answers for example in examples] == [("unanswerable",), ("Tür",)]
    assert [one.reason[: len(reason)] for one in bad] == [reason]


def test_read_reports_a_question_without_a_picture(folder: Folder, task: VizWiz) -> None:
    questions = document()
    del questions[1]["image"]
    folder.write("val.json", questions)
    _, bad = task.read("validation")
    assert [(one.entry, one.reason.split(";")[0]) for one in bad] == [("entry[1]", "it has no 'image'")]


def test_read_reports_all_rows_of_a_split_without_answers(folder: Folder, task: VizWiz) -> None:
    folder.write("val.json", [{"image": entry["image"], "question": entry["question"]} for entry in document()])
    examples, bad = task.read("validation")
    assert examples == []
    assert [one.reason.split(";")[0] for one in bad] == ["it has no 'answers'"] * 3


def test_right_answers_score_one(folder: Folder, task: VizWiz) -> None:
    folder.write("val.json", document())
    examples, _ = task.read("validation")
    metric = task.metrics()[task.primary]
    written = [task.parse(f" {example.answers[0]}\n", example) for example in examples]
    metric.update(written, [example.reference for example in examples])
    assert metric.compute().item() == pytest.approx(1)
