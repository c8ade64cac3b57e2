from typing import Any

import pytest

from moadapt.picture import Picture
from moadapt.registry import TASKS
from moadapt.task import Example
from moadapt_tasks.vqa import VQA
from tests.tasks.spoiled_folder import SIZE, Folder

Document = dict[str, list[dict[str, Any]]]
ANSWERS = ["two"] * 4 + ["2"] * 3 + ["three"] * 2 + ["many"]


def documents() -> tuple[Document, Document]:
    questions: list[dict[str, Any]] = [
        {"question_id": 420, "image_id": 42, "question": "How many cats are there?"},
        {"question_id": 421, "image_id": 42, "question": " Is one {black}? "},
        {"question_id": 70, "image_id": 7, "question": "What is it?"},
    ]
    answers = {420: (ANSWERS, "2"), 421: (["yes"] * 10, "yes"), 70: (["dog"] * 10, "dog")}
    annotations = [
        {
            "question_id": question["question_id"],
            "image_id": question["image_id"],
            "multiple_choice_answer": answers[question["question_id"]][1],
            "question_type": "other",
            "answer_type": "other",
            "answers": [
                {"answer": text, "answer_confidence": "yes", "answer_id": number}
                for number, text in enumerate(answers[question["question_id"]][0], start=1)
            ],
        }
        for question in questions
    ]
    return {"questions": questions}, {"annotations": annotations}


@pytest.fixture
def task(folder: Folder) -> VQA:
    for image_id in (7, 42):
        folder.picture(f"COCO_train2014_{image_id:012d}.png")
    return task_on(folder)


def task_on(folder: Folder, **changes: Any) -> VQA:
    files = {
        "questions": f"{folder.path}/questions_{{split}}.json",
        "annotations": f"{folder.path}/annotations_{{split}}.json",
        "images": f"{folder.path}/COCO_{{split}}_{{image_id:012d}}.png",
    }
    return VQA(**files | {"splits": {"train": "train2014"}} | changes)


def write(folder: Folder, questions: Any, annotations: Any) -> None:
    folder.write("questions_train2014.json", questions)
    folder.write("annotations_train2014.json", annotations)


def test_vqa_is_registered() -> None:
    assert TASKS.get("vqa") is VQA


def test_read_returns_the_rows_of_a_split(folder: Folder, task: VQA) -> None:
    write(folder, *documents())
    examples, bad = task.read("train")
    assert bad == []
    assert [example.prompt for example in examples] == ["How many cats are there?", "Is one {black}?", "What is it?"]
    assert examples[0] == Example(
        pictures=(Picture(folder.path / "COCO_train2014_000000000042.png", SIZE),),
        prompt="How many cats are there?",
        answers=("2",),
        reference=ANSWERS,
        entry=f"{folder.path}/questions_train2014.json: question_id 420",
    )


def test_read_follows_the_settings(folder: Folder, task: VQA) -> None:
    write(folder, *documents())
    examples, _ = task_on(folder, limit=1, prompt="{question} Be short.", train_answers="all").read("train")
    assert len(examples) == 1
    assert examples[0].prompt == "How many cats are there? Be short."
    assert examples[0].answers == tuple(ANSWERS)


def test_read_accepts_identifiers_that_are_texts(folder: Folder) -> None:
    folder.picture("a1.png")
    questions, annotations = documents()
    for entry in (*questions["questions"], *annotations["annotations"]):
        entry["image_id"] = "a1"
        entry["question_id"] = f"q{entry['question_id']}"
    write(folder, questions, annotations)
    examples, bad = task_on(folder, images=f"{folder.path}/{{image_id}}.png").read("train")
    assert (len(examples), bad) == (3, [])
    assert examples[0].entry.endswith("question_id 'q420'")


def test_read_accepts_the_okvqa_form(folder: Folder) -> None:
    folder.picture("COCO_val2014_000000297147.jpg")
    asked = {"image_id": 297147, "question": "What sport can you use this for?", "question_id": 2971475}
    said = ["racing"] * 4 + ["motocross"] * 4 + ["ride"] * 2
    people = [
        {"answer_id": number, "raw_answer": f"{text}ing", "answer_confidence": "yes", "answer": text}
        for number, text in enumerate(said, start=1)
    ]
    kinds = {"answer_type": "other", "question_type": "one", "confidence": 3}
    folder.write("OpenEnded_mscoco_val2014_questions.json", {"task_type": "Open-Ended", "questions": [asked]})
    folder.write(
        "mscoco_val2014_annotations.json",
        {"annotations": [{"image_id": 297147, "question_id": 2971475, "answers": people, **kinds}]},
    )
    task = VQA(
        questions=f"{folder.path}/OpenEnded_mscoco_{{split}}_questions.json",
        annotations=f"{folder.path}/mscoco_{{split}}_annotations.json",
        images=f"{folder.path}/COCO_{{split}}_{{image_id:012d}}.jpg",
        splits={"validation": "val2014"},
    )
    examples, bad = task.read("validation")
    assert bad == []
    assert [(example.prompt, example.answers, example.reference) for example in examples] == [
        (asked["question"], ("racing",), said)
    ]


@pytest.mark.parametrize(
    ("key", "value", "entry", "reason"),
    [
        ("question", "  ", "question_id 421", "its question is empty"),
        ("question", None, "question_id 421", "its question is None; give a text"),
        ("question", "", "question_id 421", "its question is empty"),
        ("image_id", 1.5, "question_id 421", "its image_id is 1.5; give an integer or a text"),
        ("image_id", "42", "question_id 421", "its image_id is not '42'"),
        ("image_id", 43, "question_id 421", "its image_id is not 43"),
        ("question_id", 999, "question_id 999", "its question_id 999 is unknown to"),
        ("question_id", 420, "question_id 420", "its question_id 420 is that of an earlier entry"),
        ("question_id", None, "question_id None", "its question_id is None; give an integer or a text"),
    ],
)
def test_read_reports_a_bad_question(folder: Folder, task: VQA, key: str, value: Any, entry: str, reason: str) -> None:
    questions, annotations = documents()
    questions["questions"][1][key] = value
    write(folder, questions, annotations)
    examples, bad = task.read("train")
    assert [example.entry.rsplit(" ", 1)[1] for example in examples] == ["420", "70"]
    assert any(one.entry == entry and one.reason.startswith(reason) for one in bad), bad


@pytest.mark.parametrize("key", ["question_id", "image_id", "question"])
def test_read_reports_a_question_that_lacks(folder: Folder, task: VQA, key: str) -> None:
    questions, annotations = documents()
    del questions["questions"][1][key]
    write(folder, questions, annotations)
    examples, bad = task.read("train")
    assert len(examples) == 2
    assert bad[0].entry == ("questions[1]" if key == "question_id" else "question_id 421")
    assert bad[0].reason.startswith(f"it has no '{key}'; it has: ")


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("answers", [], "its answers is []; give a list with at least one object"),
        ("answers", None, "its answers is None"),
        ("answers", ["yes"], "it is 'yes'; give a JSON object"),
        ("answers", [{"answer": "yes"}, {"answer": " "}], "its answer is empty"),
        ("answers", [{"answer": 3}], "its answer is 3; give a text"),
        ("answers", [{"text": "yes"}], "it has no 'answer'"),
        ("multiple_choice_answer", 3, "its multiple_choice_answer is 3; give a text"),
        ("image_id", 7, "its image_id is not 42, that of its question in"),
        ("question_id", 999, "its question_id 999 is unknown to"),
        ("question_id", 420, "its question_id 420 is that of an earlier entry"),
    ],
)
def test_read_reports_a_bad_annotation(folder: Folder, task: VQA, key: str, value: Any, reason: str) -> None:
    questions, annotations = documents()
    annotations["annotations"][1][key] = value
    write(folder, questions, annotations)
    examples, bad = task.read("train")
    assert [example.entry.rsplit(" ", 1)[1] for example in examples] == ["420", "70"]
    file = folder.path / "annotations_train2014.json"
    assert any(one.file == file and one.reason.startswith(reason) for one in bad), bad


def test_read_reports_a_question_without_annotation(folder: Folder, task: VQA) -> None:
    questions, annotations = documents()
    del annotations["annotations"][1]
    write(folder, questions, annotations)
    examples, bad = task.read("train")
    assert len(examples) == 2
    assert [(one.file.name, one.entry) for one in bad] == [("questions_train2014.json", "question_id 421")]
    assert "its question_id 421 is unknown to" in bad[0].reason
    assert "annotations_train2014.json" in bad[0].reason


def test_read_reports_each_question_about_a_missing_picture(folder: Folder, task: VQA) -> None:
    write(folder, *documents())
    (folder.path / "COCO_train2014_000000000042.png").unlink()
    examples, bad = task.read("train")
    assert [example.prompt for example in examples] == ["What is it?"]
    assert [one.entry for one in bad] == ["question_id 420", "question_id 421"]
    assert all("COCO_train2014_000000000042.png does not exist" in one.reason for one in bad)


def test_read_refuses_a_file_without_its_list(folder: Folder, task: VQA) -> None:
    questions, annotations = documents()
    write(folder, annotations, annotations)
    with pytest.raises(ValueError, match=r"questions_train2014.json lacks 'questions': the document has annotations"):
        task.read("train")
    write(folder, questions, questions)
    with pytest.raises(ValueError, match=r"annotations_train2014.json lacks 'annotations'"):
        task.read("train")


def test_read_refuses_a_split_without_word_and_one_without_files(folder: Folder) -> None:
    with pytest.raises(ValueError, match="no split 'test'; its `splits` name train"):
        task_on(folder).read("test")
    with pytest.raises(ValueError, match=r"questions_train2014.json does not exist"):
        task_on(folder).read("train")


def test_vqa_refuses_an_unknown_choice_of_answers(folder: Folder) -> None:
    with pytest.raises(ValueError, match="`train_answers` is 'some'; give most_common or all"):
        task_on(folder, train_answers="some")


def test_right_answers_score_one(folder: Folder, task: VQA) -> None:
    write(folder, *documents())
    examples, _ = task.read("train")
    metric = task.metrics()[task.primary]
    metric.update(
        [task.parse(f" {example.answers[0]}\n", example) for example in examples],
        [example.reference for example in examples],
    )
    assert metric.compute().item() == pytest.approx(1)  # seven of ten say two, which is more than enough
