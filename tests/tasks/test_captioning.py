from typing import Any

import pytest

from moadapt.picture import Picture
from moadapt.registry import TASKS
from moadapt.task import Example
from moadapt_tasks.captioning import Captioning
from tests.tasks.spoiled_folder import SIZE, Folder

Document = dict[str, list[dict[str, Any]]]


def document() -> Document:
    return {
        "images": [
            {"id": 42, "file_name": "cats.png", "width": 40, "height": 30},
            {"id": 7, "file_name": "dog.jpg", "width": 40, "height": 30},
        ],
        "annotations": [
            {"id": 1, "image_id": 7, "caption": "A dog runs."},
            {"id": 2, "image_id": 42, "caption": "Two cats. "},
            {"id": 3, "image_id": 42, "caption": "Cats {asleep} on a sofa."},
        ],
    }


@pytest.fixture
def task(folder: Folder) -> Captioning:
    folder.picture("cats.png", "RGBA")
    folder.picture("dog.jpg", "L")
    return task_on(folder)


def task_on(folder: Folder, **changes: Any) -> Captioning:
    files = {"captions": f"{folder.path}/captions_{{split}}.json", "images": f"{folder.path}/{{file_name}}"}
    return Captioning(**files | {"splits": {"validation": "val2014"}} | changes)


def write(folder: Folder, captions: Any) -> None:
    folder.write("captions_val2014.json", captions)


def test_captioning_is_registered() -> None:
    assert TASKS.get("captioning") is Captioning


def test_read_returns_one_row_an_image(folder: Folder, task: Captioning) -> None:
    write(folder, document())
    examples, bad = task.read("validation")
    assert bad == []
    captions = ["Two cats.", "Cats {asleep} on a sofa."]
    assert examples[0] == Example(
        pictures=(Picture(folder.path / "cats.png", SIZE),),
        prompt="describe the picture",
        answers=tuple(captions),
        reference=captions,
        entry=f"{folder.path}/captions_val2014.json: images id 42",
    )
    assert (examples[1].pictures[0].file.name, examples[1].answers) == ("dog.jpg", ("A dog runs.",))


def test_read_follows_the_settings(folder: Folder, task: Captioning) -> None:
    write(folder, document())
    folder.picture("7.png")
    folder.picture("42.png")
    changed = task_on(folder, limit=1, prompt="say {what} you see", images=f"{folder.path}/{{image_id}}.png")
    examples, _ = changed.read("validation")
    assert [(example.prompt, example.pictures[0].file.name) for example in examples] == [
        ("say {what} you see", "42.png")
    ]


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("caption", " ", "its caption is empty"),
        ("caption", 3, "its caption is 3; give a text"),
        ("image_id", 43, "its image_id 43 is unknown to"),
        ("image_id", "42", "its image_id '42' is unknown to"),
        ("image_id", None, "its image_id is None"),
        ("id", 2, "its id 2 is that of an earlier entry"),
    ],
)
def test_read_leaves_out_a_bad_caption(folder: Folder, task: Captioning, key: str, value: Any, reason: str) -> None:
    captions = document()
    captions["annotations"][2][key] = value
    write(folder, captions)
    examples, bad = task.read("validation")
    assert [example.answers for example in examples] == [("Two cats.",), ("A dog runs.",)]
    assert [(one.entry, one.reason[: len(reason)]) for one in bad] == [
        (f"annotations id {captions['annotations'][2]['id']}", reason)
    ]


@pytest.mark.parametrize("key", ["id", "image_id", "caption"])
def test_read_reports_a_caption_that_lacks(folder: Folder, task: Captioning, key: str) -> None:
    captions = document()
    del captions["annotations"][2][key]
    write(folder, captions)
    _, bad = task.read("validation")
    assert [one.entry for one in bad] == ["annotations[2]" if key == "id" else "annotations id 3"]
    assert bad[0].reason.startswith(f"it has no '{key}'")


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("file_name", "", "its file_name is empty"),
        ("file_name", None, "its file_name is None"),
        ("file_name", "gone.png", "its picture"),
        ("id", 42, "its id 42 is that of an earlier entry"),
        ("id", 8, "no usable caption describes it"),
    ],
)
def test_read_reports_a_bad_image(folder: Folder, task: Captioning, key: str, value: Any, reason: str) -> None:
    captions = document()
    captions["images"][1][key] = value
    write(folder, captions)
    examples, bad = task.read("validation")
    assert [example.pictures[0].file.name for example in examples] == ["cats.png"]
    assert any(one.entry.startswith("images id") and one.reason.startswith(reason) for one in bad), bad


def test_read_reports_an_image_whose_only_caption_is_empty(folder: Folder, task: Captioning) -> None:
    captions = document()
    captions["annotations"][0]["caption"] = ""
    write(folder, captions)
    examples, bad = task.read("validation")
    assert [example.pictures[0].file.name for example in examples] == ["cats.png"]
    assert [one.entry for one in bad] == ["annotations id 1", "images id 7"]


@pytest.mark.parametrize("key", ["images", "annotations"])
def test_read_refuses_a_file_without_its_list(folder: Folder, task: Captioning, key: str) -> None:
    captions = document()
    del captions[key]
    write(folder, captions)
    with pytest.raises(ValueError, match=f"captions_val2014.json lacks '{key}'"):
        task.read("validation")


def test_metrics_score_a_reference_as_perfect(folder: Folder, task: Captioning) -> None:
    write(folder, document())
    examples, _ = task.read("validation")
    metrics = task.metrics()
    for metric in metrics.values():
        written = [task.parse(f"{example.answers[0]}\n", example) for example in examples]
        metric.update(written, [example.reference for example in examples])
    assert task.primary in metrics
    assert metrics["rouge_l"].compute().item() == pytest.approx(1)
    assert metrics["bleu"].compute()["bleu_2"].item() == pytest.approx(1)
    assert metrics["cider_d"].compute().item() > 0
