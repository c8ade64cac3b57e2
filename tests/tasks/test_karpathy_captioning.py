from typing import Any

import pytest

from moadapt.picture import Picture
from moadapt.registry import TASKS
from moadapt.task import Example
from moadapt_tasks.karpathy_captioning import KarpathyCaptioning
from tests.tasks.spoiled_folder import SIZE, Folder


def document() -> dict[str, Any]:
    def entry(imgid: int, folder: str, filename: str, split: str, *captions: str) -> dict[str, Any]:
        sentences = [
            {"tokens": text.lower().split(), "raw": text, "imgid": imgid, "sentid": imgid * 10 + k}
            for k, text in enumerate(captions)
        ]
        ids = {"sentids": [each["sentid"] for each in sentences], "imgid": imgid, "cocoid": 500 + imgid}
        return ids | {"filepath": folder, "filename": filename, "split": split, "sentences": sentences}

    images = [
        entry(0, "val2014", "COCO_val2014_000000000500.jpg", "test", "A man {on} a bike.", "Ein Mañn.\n"),
        entry(1, "train2014", "COCO_train2014_000000000501.jpg", "train", "A cat.", "Two cats."),
        entry(2, "val2014", "COCO_val2014_000000000502.jpg", "restval", "A dog."),
        entry(3, "val2014", "COCO_val2014_000000000503.jpg", "val", "A bird."),
    ]
    return {"images": images, "dataset": "coco"}


@pytest.fixture
def task(folder: Folder) -> KarpathyCaptioning:
    for image in document()["images"]:
        (folder.path / image["filepath"]).mkdir(exist_ok=True)
        folder.picture(f"{image['filepath']}/{image['filename']}")
    return task_on(folder)


def task_on(folder: Folder, **changes: Any) -> KarpathyCaptioning:
    files = {"captions": f"{folder.path}/dataset_coco.json", "images": f"{folder.path}/{{filepath}}/{{filename}}"}
    return KarpathyCaptioning(**files | changes)


def write(folder: Folder, captions: Any) -> None:
    folder.write("dataset_coco.json", captions)


def test_karpathy_captioning_is_registered() -> None:
    assert TASKS.get("karpathy_captioning") is KarpathyCaptioning


def test_read_returns_one_row_an_image_of_the_split(folder: Folder, task: KarpathyCaptioning) -> None:
    write(folder, document())
    examples, bad = task.read("test")
    captions = ["A man {on} a bike.", "Ein Mañn."]
    assert (examples, bad) == (
        [
            Example(
                pictures=(Picture(folder.path / "val2014/COCO_val2014_000000000500.jpg", SIZE),),
                prompt="describe the picture",
                answers=tuple(captions),
                reference=captions,
                entry=f"{folder.path}/dataset_coco.json: imgid 0",
            )
        ],
        [],
    )


@pytest.mark.parametrize(
    ("split", "changes", "expected"),
    [
        ("train", {}, [("A cat.", "Two cats."), ("A dog.",)]),
        ("train", {"splits": {"train": ["train"]}}, [("A cat.", "Two cats.")]),
        ("train", {"limit": 1}, [("A cat.", "Two cats.")]),
        ("validation", {}, [("A bird.",)]),
    ],
)
def test_read_takes_the_entries_that_the_words_mark(
    folder: Folder, task: KarpathyCaptioning, split: str, changes: dict[str, Any], expected: list[tuple[str, ...]]
) -> None:
    write(folder, document())
    examples, bad = task_on(folder, **changes).read(split)
    assert ([example.answers for example in examples], bad) == (expected, [])


def test_read_accepts_the_flickr30k_form(folder: Folder) -> None:
    flickr = document()
    for image in flickr["images"]:
        del image["filepath"], image["cocoid"]
        folder.picture(image["filename"])
    write(folder, flickr)
    task = task_on(folder, images=f"{folder.path}/{{filename}}", prompt="what is here?")
    examples, bad = task.read("validation")
    assert ([(example.prompt, example.answers) for example in examples], bad) == ([("what is here?", ("A bird.",))], [])
    _, bad = task_on(folder).read("validation")
    assert [one.reason.split(";")[0] for one in bad] == ["it has no 'filepath'"]


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("filename", "gone.jpg", "its picture"),
        ("filename", 5, "its filename is 5; give a text"),
        ("filepath", "", "its filepath is empty"),
        ("split", None, "its split is None; give a text"),
        ("imgid", 0, "its imgid 0 is that of an earlier entry"),
        ("imgid", None, "its imgid is None"),
        ("sentences", [], "its sentences is []; give a list with at least one object"),
        ("sentences", "A cat.", "its sentences is 'A cat.'"),
    ],
)
def test_read_reports_a_bad_image(folder: Folder, task: KarpathyCaptioning, key: str, value: Any, reason: str) -> None:
    captions = document()
    captions["images"][1][key] = value
    write(folder, captions)
    examples, bad = task.read("train")
    assert [example.answers for example in examples] == [("A dog.",)]
    assert [one.reason[: len(reason)] for one in bad] == [reason]


@pytest.mark.parametrize(
    ("sentence", "reason"),
    [
        ({"sentid": 11, "raw": " "}, "its raw is empty"),
        ({"sentid": 11, "raw": ["Two", "cats."]}, "its raw is ['Two', 'cats.']; give a text"),
        ({"sentid": 11, "tokens": ["two", "cats"]}, "it has no 'raw'; it has: sentid, tokens"),
        ("Two cats.", "it is 'Two cats.'; give a JSON object"),
    ],
)
def test_read_reports_a_bad_caption(folder: Folder, task: KarpathyCaptioning, sentence: Any, reason: str) -> None:
    captions = document()
    captions["images"][1]["sentences"][1] = sentence
    write(folder, captions)
    examples, bad = task.read("train")
    assert [one.reason for one in bad] == [reason] or bad[0].reason.startswith(reason)
    if isinstance(sentence, dict):
        assert [example.answers for example in examples] == [("A cat.",), ("A dog.",)]
        assert [one.entry for one in bad] == ["imgid 1, sentid 11"]


def test_read_reports_an_image_without_a_usable_caption(folder: Folder, task: KarpathyCaptioning) -> None:
    captions = document()
    captions["images"][2]["sentences"][0]["raw"] = ""
    write(folder, captions)
    _, bad = task.read("train")
    assert [(one.entry, one.reason.split(";")[0]) for one in bad] == [
        ("imgid 2, sentid 20", "its raw is empty"),
        ("imgid 2", "none of its sentences is usable"),
    ]


def test_read_refuses_words_that_no_entry_has(folder: Folder, task: KarpathyCaptioning) -> None:
    write(folder, document())
    with pytest.raises(
        ValueError, match=r"no entry is of split 'dev' or 'x'; there are restval, test, train, val. Set"
    ):
        task_on(folder, splits={"test": ["dev", "x"]}).read("test")


@pytest.mark.parametrize("words", ["train", []])
def test_karpathy_captioning_refuses_words_that_are_no_list(folder: Folder, words: Any) -> None:
    with pytest.raises(ValueError, match=r"`splits` gives .* for train; give a list of words"):
        task_on(folder, splits={"train": words})


def test_metrics_score_a_reference_as_perfect(folder: Folder, task: KarpathyCaptioning) -> None:
    write(folder, document())
    examples, _ = task.read("train")
    metric = task.metrics()["rouge_l"]
    metric.update(
        [task.parse(f"{example.answers[0]}\n", example) for example in examples], [e.reference for e in examples]
    )
    assert task.primary in task.metrics()
    assert metric.compute().item() == pytest.approx(1)
