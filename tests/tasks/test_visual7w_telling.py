from typing import Any

import pytest

from moadapt.picture import Picture
from moadapt.registry import TASKS
from moadapt_tasks.visual7w_telling import Visual7WTelling
from tests.tasks.spoiled_folder import SIZE, Folder


def document() -> dict[str, Any]:
    def pair(qa_id: int, image_id: int, question: str, answer: str, *wrong: str) -> dict[str, Any]:
        ids = {"qa_id": qa_id, "image_id": image_id, "type": question.split()[0].lower()}
        return ids | {"question": question, "answer": answer, "multiple_choices": list(wrong)}

    def image(image_id: int, split: str, *pairs: dict[str, Any]) -> dict[str, Any]:
        return {"image_id": image_id, "filename": f"v7w_{image_id}.jpg", "split": split, "qa_pairs": list(pairs)}

    return {
        "dataset": "visual7w-telling",
        "images": [
            image(
                2358019,
                "val",
                pair(500, 2358019, "What {color} is it?", "Red.", "Blue.", "Green.", "Señor."),
                pair(501, 2358019, "Who is there?", "A man.", "A dog.", "A cat.", "No one."),
            ),
            image(7, "train", pair(502, 7, "Where?", "Here.", "There.", "Up.", "Down.")),
            image(8, "val", pair(503, 8, "Why?", "So.", "Not.", "Maybe.", "Never.")),
        ],
    }


@pytest.fixture
def task(folder: Folder) -> Visual7WTelling:
    for image in document()["images"]:
        folder.picture(image["filename"])
    return task_on(folder)


def task_on(folder: Folder, **changes: Any) -> Visual7WTelling:
    files = {"questions": f"{folder.path}/dataset_v7w_telling.json", "images": f"{folder.path}/{{filename}}"}
    return Visual7WTelling(**files | changes)


def write(folder: Folder, questions: Any) -> None:
    folder.write("dataset_v7w_telling.json", questions)


def test_visual7w_telling_is_registered() -> None:
    assert TASKS.get("visual7w_telling") is Visual7WTelling


def test_read_returns_one_row_a_question_of_the_split(folder: Folder, task: Visual7WTelling) -> None:
    write(folder, document())
    examples, bad = task.read("validation")
    assert bad == []
    assert [example.entry.rsplit(" ", 1)[1] for example in examples] == ["500", "501", "503"]
    first = examples[0]
    assert first.pictures == (Picture(folder.path / "v7w_2358019.jpg", SIZE),)
    question, *options, request = first.prompt.split("\n")
    assert (question, request) == ("What {color} is it?", "Answer with the letter of an option.")
    assert {option[3:] for option in options} == {"Red.", "Blue.", "Green.", "Señor."}
    assert [option[:3] for option in options] == ["A. ", "B. ", "C. ", "D. "]
    assert f"{first.answers[0]}. Red." in options
    assert first.reference == {"right": first.answers[0], "options": [option[3:] for option in options]}


def test_right_answers_stand_anywhere_and_always_at_the_same_place(folder: Folder, task: Visual7WTelling) -> None:
    questions = document()
    pair = questions["images"][0]["qa_pairs"][0]
    questions["images"][0]["qa_pairs"] = [pair | {"qa_id": number} for number in range(1000, 1400)]
    write(folder, questions)
    answers = [example.answers[0] for example in task.read("validation")[0]]
    assert all(60 < answers.count(letter) < 140 for letter in "ABCD")  # a hundred each, in the mean
    assert [example.answers[0] for example in task.read("validation")[0]] == answers


def test_read_follows_the_settings(folder: Folder, task: Visual7WTelling) -> None:
    write(folder, document())
    folder.picture("7.png")
    changed = task_on(folder, prompt="{options}\n{question}", images=f"{folder.path}/{{image_id}}.png", limit=1)
    examples, _ = changed.read("train")
    assert examples[0].prompt.endswith("\nWhere?")
    assert examples[0].pictures[0].file.name == "7.png"


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("question", "", "its question is empty"),
        ("answer", None, "its answer is None; give a text"),
        ("multiple_choices", [], "its multiple_choices is []; give a list with at least one text"),
        ("multiple_choices", ["Blue.", ""], "its text is empty"),
        ("multiple_choices", "Blue.", "its multiple_choices is 'Blue.'"),
        ("qa_id", 500, "its qa_id 500 is that of an earlier entry"),
        ("qa_id", None, "its qa_id is None"),
    ],
)
def test_read_reports_a_bad_question(folder: Folder, task: Visual7WTelling, key: str, value: Any, reason: str) -> None:
    questions = document()
    questions["images"][0]["qa_pairs"][1][key] = value
    write(folder, questions)
    examples, bad = task.read("validation")
    assert [example.entry.rsplit(" ", 1)[1] for example in examples] == ["500", "503"]
    assert [one.reason[: len(reason)] for one in bad] == [reason]


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("filename", "gone.jpg", "its picture"),
        ("filename", None, "its filename is None"),
        ("qa_pairs", [], "its qa_pairs is []"),
        ("qa_pairs", ["x"], "it is 'x'; give a JSON object"),
        ("split", 3, "its split is 3; give a text"),
    ],
)
def test_read_reports_a_bad_image_once(
    folder: Folder, task: Visual7WTelling, key: str, value: Any, reason: str
) -> None:
    questions = document()
    questions["images"][0][key] = value
    write(folder, questions)
    examples, bad = task.read("validation")
    assert [example.entry.rsplit(" ", 1)[1] for example in examples] == ["503"]
    assert [one.reason[: len(reason)] for one in bad] == [reason]


def test_right_answers_score_one(folder: Folder, task: Visual7WTelling) -> None:
    write(folder, document())
    examples, _ = task.read("validation")
    metric = task.metrics()[task.primary]
    letters = [task.parse(f" {example.answers[0]}.\n", example) for example in examples]
    texts = [task.parse(text, example) for text, example in zip(("red", "a man", "So"), examples, strict=True)]
    assert letters == texts
    metric.update([*letters, ""], [*[example.reference for example in examples], examples[0].reference])
    assert metric.compute().item() == 0.75
