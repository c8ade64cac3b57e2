from typing import Any

import pytest

from moadapt.picture import Picture
from moadapt.registry import TASKS
from moadapt.task import Example
from moadapt_tasks.textvqa import TextVQA
from tests.tasks.spoiled_folder import SIZE, Folder

ANSWERS = ["nokia"] * 3 + ["Nokia 3310"] * 5 + ["naïve ☎"] * 2


def document() -> dict[str, Any]:
    def entry(question_id: int, image_id: str, question: str, answers: list[str]) -> dict[str, Any]:
        return {
            "question_id": question_id,
            "image_id": image_id,
            "question": question,
            "question_tokens": question.split(),
            "image_classes": ["Mobile phone"],
            "image_width": SIZE[0],
            "image_height": SIZE[1],
            "flickr_original_url": "https://example.org/a.jpg",
            "answers": answers,
            "set_name": "val",
        }

    return {
        "dataset_type": "val",
        "dataset_name": "textvqa",
        "dataset_version": "0.5.1",
        "data": [
            entry(34602, "003a8ae2ef43b901", "what is the brand of this {camera}?", ANSWERS),
            entry(34603, "003a8ae2ef43b901", "¿qué año?", ["1998"] * 10),
            entry(34604, "2b538a43dd933fc1", "what kind of beer is this?", ["ale"] * 10),
        ],
    }


@pytest.fixture
def task(folder: Folder) -> TextVQA:
    folder.picture("003a8ae2ef43b901.jpg")
    folder.picture("2b538a43dd933fc1.jpg", "L")
    return task_on(folder)


def task_on(folder: Folder, **changes: Any) -> TextVQA:
    files = {"questions": f"{folder.path}/TextVQA_0.5.1_{{split}}.json", "images": f"{folder.path}/{{image_id}}.jpg"}
    return TextVQA(**files | {"splits": {"validation": "val"}} | changes)


def write(folder: Folder, questions: Any) -> None:
    folder.write("TextVQA_0.5.1_val.json", questions)


def test_textvqa_is_registered() -> None:
    assert TASKS.get("textvqa") is TextVQA


def test_read_returns_the_rows_of_a_split(folder: Folder, task: TextVQA) -> None:
    write(folder, document())
    examples, bad = task.read("validation")
    assert bad == []
    assert examples[0] == Example(
        pictures=(Picture(folder.path / "003a8ae2ef43b901.jpg", SIZE),),
        prompt="what is the brand of this {camera}?",
        answers=("Nokia 3310",),
        reference=ANSWERS,
        entry=f"{folder.path}/TextVQA_0.5.1_val.json: question_id 34602",
    )
    assert [example.prompt for example in examples[1:]] == ["¿qué año?", "what kind of beer is this?"]


def test_read_follows_the_settings(folder: Folder, task: TextVQA) -> None:
    write(folder, document())
    examples, _ = task_on(folder, limit=1, prompt="{question} Be short.", train_answers="all").read("validation")
    assert [(example.prompt, example.answers) for example in examples] == [
        ("what is the brand of this {camera}? Be short.", tuple(ANSWERS))
    ]


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("question", " ", "its question is empty"),
        ("question", ["what"], "its question is ['what']; give a text"),
        ("image_id", "gone", "its picture"),
        ("image_id", None, "its image_id is None; give an integer or a text"),
        ("answers", [], "its answers is []; give a list with at least one text"),
        ("answers", "1998", "its answers is '1998'"),
        ("answers", ["1998", ""], "its text is empty"),
        ("answers", [{"answer": "1998"}], "its text is {'answer': '1998'}; give a text"),
        ("question_id", 34602, "its question_id 34602 is that of an earlier entry"),
        ("question_id", None, "its question_id is None"),
    ],
)
def test_read_reports_a_bad_question(folder: Folder, task: TextVQA, key: str, value: Any, reason: str) -> None:
    questions = document()
    questions["data"][1][key] = value
    write(folder, questions)
    examples, bad = task.read("validation")
    assert [example.entry.rsplit(" ", 1)[1] for example in examples] == ["34602", "34604"]
    name = f"question_id {questions['data'][1]['question_id']}"
    assert [(one.entry.split(",")[0], one.reason[: len(reason)]) for one in bad] == [(name, reason)]


def test_read_reports_all_rows_of_a_split_without_answers(folder: Folder, task: TextVQA) -> None:
    questions = document()
    for entry in questions["data"]:
        del entry["answers"]
    write(folder, questions)
    examples, bad = task.read("validation")
    assert (examples, len(bad)) == ([], 3)
    assert all(one.reason.startswith("it has no 'answers'; it has: ") for one in bad)


def test_read_refuses_a_file_without_its_list(folder: Folder, task: TextVQA) -> None:
    write(folder, document()["data"])
    with pytest.raises(ValueError, match=r"TextVQA_0.5.1_val.json lacks 'data': the document is no object"):
        task.read("validation")


def test_right_answers_score_one(folder: Folder, task: TextVQA) -> None:
    write(folder, document())
    examples, _ = task.read("validation")
    metric = task.metrics()[task.primary]
    written = [task.parse(f" {example.answers[0]}\n", example) for example in examples]
    metric.update(written, [example.reference for example in examples])
    assert metric.compute().item() == pytest.approx(1)  # five of ten say so, which is more than enough


def test_textvqa_refuses_an_unknown_choice_of_answers(folder: Folder) -> None:
    with pytest.raises(ValueError, match="`train_answers` is 'some'"):
        task_on(folder, train_answers="some")
