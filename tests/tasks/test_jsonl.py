import json
from typing import Any

import pytest
import torch

from moadapt.picture import Picture
from moadapt.registry import TASKS, TEXT_METRICS
from moadapt.task import Example
from moadapt_tasks.jsonl import JSONLines
from tests.tasks.spoiled_folder import SIZE, Folder

Rows = list[dict[str, Any]]


def documents() -> Rows:
    return [
        {"image": "cat.png", "question": "what {is} it?", "answer": "a cat", "extra": [1]},
        {"image": ["cat.png", "dog.jpg"], "question": "¿cuántos?", "answer": ["two", "2"]},
        {"image": None, "question": "what is 1 + 1?", "answer": "two"},
        {"image": [], "question": "and 2 + 2?", "answer": "four"},
    ]


@pytest.fixture
def task(folder: Folder) -> JSONLines:
    folder.picture("cat.png", "RGBA")
    folder.picture("dog.jpg")
    return task_on(folder)


def task_on(folder: Folder, **changes: Any) -> JSONLines:
    files = {"rows": f"{folder.path}/{{split}}.jsonl", "images": [f"{folder.path}/{{image}}"]}
    return JSONLines(**files | changes)


def write(folder: Folder, rows: Rows) -> None:
    (folder.path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def test_jsonl_is_registered() -> None:
    assert TASKS.get("jsonl") is JSONLines


def test_read_returns_rows_with_any_number_of_pictures(folder: Folder, task: JSONLines) -> None:
    write(folder, documents())
    examples, bad = task.read("train")
    assert bad == []
    cat, dog = (Picture(folder.path / name, SIZE) for name in ("cat.png", "dog.jpg"))
    assert examples[0] == Example(
        pictures=(cat,),
        prompt="what {is} it?",
        answers=("a cat",),
        reference=["a cat"],
        entry=f"{folder.path}/train.jsonl: line 1",
    )
    assert [example.pictures for example in examples] == [(cat,), (cat, dog), (), ()]
    assert examples[1].answers == ("two", "2")


def test_read_follows_the_settings(folder: Folder) -> None:
    folder.picture("dev-1572-0-0.png", "RGBA", (400, 100))
    folder.picture("000000000042.png")
    row = {"identifier": "1572-0", "sentence": "Each box", "label": "true", "number": 42, "humans": ["No", "no", "yes"]}
    write(folder, [row, row])
    task = task_on(
        folder,
        images=[f"{folder.path}/dev-{{identifier}}-0.png", f"{folder.path}/{{number:012d}}.png"],
        prompt="{split}: {sentence} ({number})",
        answers="humans",
        train_answers="most_common",
        limit=1,
    )
    write(folder, [row | {"split": "dev"}] * 2)
    examples, bad = task.read("train")
    assert bad == []
    assert [(example.prompt, example.answers, example.reference) for example in examples] == [
        ("dev: Each box (42)", ("No",), ["No", "no", "yes"])
    ]
    assert [picture.size for picture in examples[0].pictures] == [(400, 100), SIZE]


def test_read_needs_no_pictures(folder: Folder) -> None:
    write(folder, documents())
    examples, bad = task_on(folder, images=[]).read("train")
    assert ([example.pictures for example in examples], bad) == ([()] * 4, [])


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("question", "", "its question is empty"),
        ("question", 1.5, "its question is 1.5; give an integer or a text"),
        ("image", "gone.png", "its picture"),
        ("image", ["cat.png", "gone.png"], "its picture"),
        ("image", ["cat.png", 7], "its text is 7; give a text"),
        ("image", "", "its image is empty"),
        ("image", True, "its image is True; give an integer or a text"),
        ("image", {"path": "cat.png"}, "its image is {'path': 'cat.png'}; give an integer or a text"),
        ("answer", "", "its answer is empty"),
        ("answer", [], "its answer is []; give a list with at least one text"),
        ("answer", ["a", " "], "its text is empty"),
        ("answer", 3, "its answer is 3; give a text"),
        ("answer", None, "its answer is None; give a text"),
    ],
)
def test_read_reports_a_bad_row(folder: Folder, task: JSONLines, key: str, value: Any, reason: str) -> None:
    rows = documents()
    rows[0][key] = value
    write(folder, rows)
    examples, bad = task.read("train")
    assert [example.entry.rsplit(" ", 1)[1] for example in examples] == ["2", "3", "4"]
    assert [(one.entry.split(",")[0], one.reason[: len(reason)]) for one in bad] == [("line 1", reason)]


@pytest.mark.parametrize("key", ["image", "question", "answer"])
def test_read_reports_a_row_that_lacks(folder: Folder, task: JSONLines, key: str) -> None:
    rows = documents()
    del rows[0][key]
    write(folder, rows)
    examples, bad = task.read("train")
    assert len(examples) == 3
    assert [(one.entry, one.reason.split(";")[0]) for one in bad] == [("line 1", f"it has no '{key}'")]


def test_read_reports_every_defect_in_one_pass(folder: Folder, task: JSONLines) -> None:
    rows = documents()
    rows[0]["image"], rows[1]["answer"] = "gone.png", ""
    write(folder, rows)
    with (folder.path / "train.jsonl").open("a") as file:
        file.write("{broken\n")
    _, bad = task.read("train")
    assert [one.entry for one in bad] == ["line 5", "line 1", "line 2"]


def test_read_refuses_two_lists_in_one_pattern(folder: Folder) -> None:
    write(folder, [{"a": ["x"], "b": ["y"], "question": "?", "answer": "!"}])
    _, bad = task_on(folder, images=["{a}/{b}"]).read("train")
    assert bad[0].reason == "its a and b are lists; give at most one in `images` '{a}/{b}'"


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"images": "{image}"}, "`images` is '{image}'; give a list of patterns"),
        ({"images": ["{image"]}, "`images` is '{image', no template"),
        ({"images": ["{image.__class__}"]}, r"mentions {image.__class__}; give names of fields"),
        ({"prompt": "{row[0]}"}, r"`prompt` .* mentions {row\[0\]}"),
        ({"prompt": "{}"}, "mentions {}"),
        ({"prompt": "{0}"}, "mentions {0}"),
        ({"rows": "{name}.jsonl"}, "`rows`"),
        ({"metric": "vqa_acuracy"}, "no text metric is called 'vqa_acuracy'; did you mean vqa_accuracy"),
        ({"metric": "moadapt_tasks.metrics.GroundingAccuracy"}, "takes no predicted texts with lists of right ones"),
        ({"metric": "bleu"}, "`score` is None; metric 'bleu' has bleu_1, bleu_2, bleu_3, bleu_4"),
        ({"metric": "rouge_l", "score": "bleu_1"}, "`score` is 'bleu_1'; metric 'rouge_l' has rouge_l"),
        ({"train_answers": "some"}, "`train_answers` is 'some'"),
        ({"limit": 0}, "`limit` is 0"),
        ({"splits": {"dev": "dev"}}, "`splits` names dev"),
    ],
)
def test_jsonl_refuses(folder: Folder, changes: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        task_on(folder, **changes)


@pytest.mark.parametrize("metric", TEXT_METRICS.names())
def test_every_text_metric_scores_rows(folder: Folder, task: JSONLines, metric: str) -> None:
    if metric in ("meteor", "spice"):
        pytest.skip("a Java program; tests/parity runs it")
    write(folder, documents())
    score = "bleu_1" if metric == "bleu" else None
    chosen = task_on(folder, metric=metric, score=score)
    examples, _ = chosen.read("train")
    judge = chosen.metrics()[metric]
    judge.update([chosen.parse(f" {e.answers[0]}\n", e) for e in examples], [e.reference for e in examples])
    value = judge.compute()
    assert torch.as_tensor(value[chosen.primary] if isinstance(value, dict) else value) > 0.5
