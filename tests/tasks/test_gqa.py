from typing import Any

import pytest

from moadapt.picture import Picture
from moadapt.registry import TASKS
from moadapt.task import Example
from moadapt_tasks.gqa import GQA
from tests.tasks.spoiled_folder import SIZE, Folder

Questions = dict[str, dict[str, Any]]


def document() -> Questions:
    def entry(image: str, question: str, answer: str, structural: str, entailed: list[str]) -> dict[str, Any]:
        return {
            "semantic": [{"operation": "select", "dependencies": [], "argument": "wall (722332)"}],
            "entailed": entailed,
            "equivalent": ["07333408"],
            "question": question,
            "imageId": image,
            "isBalanced": True,
            "groups": {"global": None, "local": "10-wall_on,s"},
            "answer": answer,
            "semanticStr": "select: wall (722332)",
            "annotations": {"answer": {}, "question": {"4": "722332"}, "fullAnswer": {"1": "722335"}},
            "types": {"detailed": "relS", "semantic": "rel", "structural": structural},
            "fullAnswer": "The pipe is on the wall.",
        }

    return {
        "07333408": entry("2375429", "What is on the {white} wall?", "pipe", "query", ["07333409", "07333408"]),
        "07333409": entry("2375429", "Is the façade white?", "yes", "verify", []),
        "15736264": entry("n161313", "Who is wearing it?", "man", "query", []),
    }


@pytest.fixture
def task(folder: Folder) -> GQA:
    folder.picture("2375429.jpg")
    folder.picture("n161313.jpg")
    return task_on(folder)


def task_on(folder: Folder, **changes: Any) -> GQA:
    files = {
        "questions": f"{folder.path}/{{split}}_balanced_questions.json",
        "images": f"{folder.path}/{{image_id}}.jpg",
    }
    return GQA(**files | {"splits": {"train": "train", "validation": "val"}} | changes)


def write(folder: Folder, questions: Any) -> None:
    folder.write("val_balanced_questions.json", questions)


def test_gqa_is_registered() -> None:
    assert TASKS.get("gqa") is GQA


def test_read_returns_the_rows_of_a_split(folder: Folder, task: GQA) -> None:
    write(folder, document())
    examples, bad = task.read("validation")
    assert bad == []
    assert examples[0] == Example(
        pictures=(Picture(folder.path / "2375429.jpg", SIZE),),
        prompt="What is on the {white} wall?",
        answers=("pipe",),
        reference={
            "id": "07333408",
            "answer": "pipe",
            "structural": "query",
            "semantic": "rel",
            "detailed": "relS",
            "balanced": True,
            "entailed": ["07333409", "07333408"],
        },
        entry=f"{folder.path}/val_balanced_questions.json: question '07333408'",
    )
    assert [example.reference["id"] for example in examples] == list(document())


def test_read_follows_the_settings(folder: Folder, task: GQA) -> None:
    questions = document()
    questions["07333408"]["groups"]["global"] = "thing"
    questions["07333408"]["isBalanced"] = False
    write(folder, questions)
    folder.write("val_choices.json", {name: {"valid": ["pipe", "cat"], "plausible": ["pipe"]} for name in questions})
    changed = task_on(folder, limit=1, prompt="Q: {question}", choices=f"{folder.path}/{{split}}_choices.json")
    examples, bad = changed.read("validation")
    assert (len(examples), bad) == (1, [])
    assert examples[0].prompt == "Q: What is on the {white} wall?"
    known = {"group": "thing", "balanced": False, "valid": ["pipe", "cat"], "plausible": ["pipe"]}
    assert examples[0].reference.items() >= known.items()


def test_read_takes_no_choices_for_training(folder: Folder, task: GQA) -> None:
    folder.write("train_balanced_questions.json", document())
    examples, bad = task_on(folder, choices=f"{folder.path}/{{split}}_choices.json").read("train")
    assert (len(examples), bad) == (3, [])
    assert "valid" not in examples[0].reference


def test_read_reports_a_question_without_choices(folder: Folder, task: GQA) -> None:
    write(folder, document())
    choices = {name: {"valid": ["pipe"], "plausible": ["pipe"]} for name in document()}
    del choices["07333409"]
    choices["15736264"]["valid"] = []
    folder.write("val_choices.json", choices)
    examples, bad = task_on(folder, choices=f"{folder.path}/{{split}}_choices.json").read("validation")
    assert [example.reference["id"] for example in examples] == ["07333408"]
    assert [(one.file.name, one.entry) for one in bad] == [
        ("val_balanced_questions.json", "question '07333409'"),
        ("val_choices.json", "question '15736264'"),
    ]


def test_read_joins_the_files_of_a_folder(folder: Folder, task: GQA) -> None:
    place = folder.path / "val_balanced_questions.json"  # the pattern may as well lead to a folder
    place.mkdir()
    parts = list(document().items())
    folder.write(f"{place.name}/1.json", dict(parts[1:]))
    folder.write(f"{place.name}/0.json", dict(parts[:2]))
    (place / "notes.txt").write_text("no questions")
    examples, bad = task.read("validation")
    assert [example.reference["id"] for example in examples] == [name for name, _ in parts]
    assert [(one.file.name, one.entry) for one in bad] == [("1.json", "question '07333409'")]
    assert "0.json has an entry of the same name" in bad[0].reason


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("question", "", "its question is empty"),
        ("question", None, "its question is None; give a text"),
        ("answer", "", "its answer is empty"),
        ("answer", 3, "its answer is 3; give a text"),
        ("imageId", "gone", "its picture"),
        ("imageId", 1.5, "its imageId is 1.5; give an integer or a text"),
        ("types", None, "its types is None; give a JSON object"),
        ("types", {"semantic": "rel"}, "it has no 'structural'; it has: semantic"),
        ("types", {"semantic": "rel", "structural": ""}, "its structural is empty"),
        ("isBalanced", "yes", "its isBalanced is 'yes'; give true or false"),
        ("groups", "thing", "its groups is 'thing'; give a JSON object"),
        ("entailed", "07333408", "its entailed is '07333408'; give a list"),
        ("entailed", [7333408], "its text is 7333408; give a text"),
    ],
)
def test_read_reports_a_bad_question(folder: Folder, task: GQA, key: str, value: Any, reason: str) -> None:
    questions = document()
    questions["07333409"][key] = value
    write(folder, questions)
    examples, bad = task.read("validation")
    assert [example.reference["id"] for example in examples] == ["07333408", "15736264"]
    assert [(one.entry.split(",")[0], one.reason[: len(reason)]) for one in bad] == [("question '07333409'", reason)]


@pytest.mark.parametrize("key", ["question", "answer", "imageId", "types"])
def test_read_reports_a_question_that_lacks(folder: Folder, task: GQA, key: str) -> None:
    questions = document()
    del questions["07333409"][key]
    write(folder, questions)
    _, bad = task.read("validation")
    assert [one.reason.split(";")[0] for one in bad] == [f"it has no '{key}'"]


@pytest.mark.parametrize("key", ["groups", "isBalanced", "entailed"])
def test_read_needs_no_more_than_types(folder: Folder, task: GQA, key: str) -> None:
    questions = document()
    del questions["07333409"][key]
    write(folder, questions)
    examples, bad = task.read("validation")
    assert (len(examples), bad) == (3, [])


@pytest.mark.parametrize(
    ("questions", "complaint"),
    [([], "it is a list; give an object"), ({}, "it is an empty object"), ("x", "it is a str")],
)
def test_read_refuses_a_file_of_something_else(folder: Folder, task: GQA, questions: Any, complaint: str) -> None:
    write(folder, questions)
    with pytest.raises(ValueError, match=rf"val_balanced_questions.json: {complaint}"):
        task.read("validation")


def test_read_reports_what_is_no_object_and_refuses_an_empty_folder(folder: Folder, task: GQA) -> None:
    write(folder, document() | {"1": ["x"]})
    examples, bad = task.read("validation")
    assert len(examples) == 3
    assert [(one.entry, one.reason) for one in bad] == [("question '1'", "it is ['x']; give a JSON object")]
    (folder.path / "train_balanced_questions.json").mkdir()
    with pytest.raises(ValueError, match="is a folder without JSON files"):
        task.read("train")


@pytest.mark.parametrize("text", ["Pipe", " pipe.\n", "pipe .", "PIPE..."])
def test_parse_gives_lower_case_without_full_stop(folder: Folder, task: GQA, text: str) -> None:
    write(folder, document())
    assert task.parse(text, task.read("validation")[0][0]) == "pipe"


def test_right_answers_score_one(folder: Folder, task: GQA) -> None:
    write(folder, document())
    examples, _ = task.read("validation")
    metric = task.metrics()["gqa"]
    written = [task.parse(f" {example.answers[0].capitalize()}.\n", example) for example in examples]
    metric.update(written, [example.reference for example in examples])
    scores = metric.compute()
    assert scores[task.primary].item() == 1
    assert scores["consistency"].item() == 1
    assert scores["structural/verify"].item() == 1
