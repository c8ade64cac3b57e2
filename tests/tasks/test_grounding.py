from typing import Any

import pytest

from moadapt.picture import Picture
from moadapt.registry import TASKS
from moadapt.task import Example
from moadapt_tasks.boxes.internvl import InternVLBoxes
from moadapt_tasks.boxes.paligemma import PaliGemmaBoxes
from moadapt_tasks.boxes.views import CentreCrop
from moadapt_tasks.grounding import Grounding
from tests.tasks.spoiled_folder import SIZE, Folder

Refs = list[dict[str, Any]]
Instances = dict[str, list[dict[str, Any]]]


def documents() -> tuple[Refs, Instances]:
    """Two objects of one picture, the first with two sentences, and one of a picture of another split."""

    def ref(ref_id: int, ann_id: int, image_id: int, split: str, *texts: str) -> dict[str, Any]:
        sentences = [
            {"sent_id": ref_id * 10 + k, "sent": text, "raw": text, "tokens": text.split()}
            for k, text in enumerate(texts)
        ]
        ids = {"ref_id": ref_id, "ann_id": ann_id, "image_id": image_id, "category_id": 1}
        return ids | {"split": split, "file_name": f"COCO_{image_id}_{ann_id}.jpg", "sentences": sentences}

    refs = [
        ref(1, 101, 42, "val", "left cat", "cat {asleep}"),
        ref(2, 102, 42, "val", "the black one"),
        ref(3, 103, 7, "train", "dog"),
    ]
    boxes = {101: [4, 3, 10, 12.5], 102: [20, 0, 20, 30], 103: [0, 0, 1, 1], 104: [0, 0, 0, 0]}
    return refs, {
        "images": [
            {"id": 42, "file_name": "cats.png", "width": 40, "height": 30},
            {"id": 7, "file_name": "dog.png", "width": 40, "height": 30},
        ],
        "annotations": [
            {"id": name, "image_id": 7 if name == 103 else 42, "category_id": 1, "bbox": box}
            for name, box in boxes.items()
        ],
    }


@pytest.fixture
def task(folder: Folder) -> Grounding:
    folder.picture("cats.png")
    return task_on(folder)


def task_on(folder: Folder, **changes: Any) -> Grounding:
    files = {name: f"{folder.path}/{name}.json" for name in ("refs", "instances")}
    splits = {"train": "train", "validation": "val", "test": "testA"}
    return Grounding(**files | {"images": f"{folder.path}/{{file_name}}", "splits": splits} | changes)


def write(folder: Folder, refs: Any, instances: Any) -> None:
    folder.write("refs.json", refs)
    folder.write("instances.json", instances)


def test_grounding_is_registered() -> None:
    assert TASKS.get("grounding") is Grounding


def test_read_returns_one_row_a_sentence_of_the_split(folder: Folder, task: Grounding) -> None:
    write(folder, *documents())
    examples, bad = task.read("validation")
    assert bad == []  # the empty box 104 belongs to no ref
    assert [example.prompt for example in examples] == [
        "where is left cat?",
        "where is cat {asleep}?",
        "where is the black one?",
    ]
    assert examples[0] == Example(
        pictures=(Picture(folder.path / "cats.png", SIZE),),
        prompt="where is left cat?",
        answers=("[100, 100, 350, 516]",),  # 4 / 40, 3 / 30, 14 / 40, 15.5 / 30 of 999
        reference=(4, 3, 14, 15.5),
        entry=f"{folder.path}/refs.json: ref_id 1, sent_id 10",
    )


def test_read_follows_the_settings(folder: Folder, task: Grounding) -> None:
    write(folder, *documents())
    changed = task_on(folder, limit=2, prompt="detect {expression}", codec=PaliGemmaBoxes())
    examples, _ = changed.read("validation")
    assert [example.prompt for example in examples] == ["detect left cat", "detect cat {asleep}"]
    assert examples[0].answers == (PaliGemmaBoxes().write([(4, 3, 14, 15.5)], SIZE, "left cat"),)


def test_parse_returns_pixels_of_the_rows_picture_or_none(folder: Folder, task: Grounding) -> None:
    write(folder, *documents())
    examples, _ = task.read("validation")
    assert task.parse("it is at [0, 0, 999, 999].", examples[0]) == pytest.approx((0, 0, 40, 30))
    assert task.parse("nowhere", examples[0]) is None


@pytest.mark.parametrize(
    ("box", "reason"),
    [
        ([4, 3, 0, 12], "its bbox is 0 wide and 12 high"),
        ([4, 3, 10, -1], "its bbox is 10 wide and -1 high"),
        ([31, 3, 10, 12], "its bbox spans 31 to 41 and 3 to 15, outside its picture of 40 by 30 pixels"),
        ([-1, 3, 10, 12], "its bbox spans -1 to 9"),
        ([4, 20, 10, 11], "its bbox spans 4 to 14 and 20 to 31"),
        ([4, 3, 10], "its bbox is [4, 3, 10]; give a list of 4 finite numbers"),
        ("4 3 10 12", "its bbox is '4 3 10 12'"),
        ([4, 3, 0.001, 11], "its box cannot be written: a box is too small: '[100, 100, 100, 466]' has one without"),
    ],
)
def test_read_reports_a_bad_box_once(folder: Folder, task: Grounding, box: Any, reason: str) -> None:
    refs, instances = documents()
    instances["annotations"][0]["bbox"] = box
    write(folder, refs, instances)
    examples, bad = task.read("validation")
    assert [example.prompt for example in examples] == ["where is the black one?"]
    assert [(one.file.name, one.entry) for one in bad] == [("instances.json", "annotations id 101")]
    assert bad[0].reason.startswith(reason)


def test_read_cuts_a_box_that_is_outside_by_rounding(folder: Folder, task: Grounding) -> None:
    refs, instances = documents()
    instances["annotations"][0]["bbox"] = [-0.2, 3, 40.4, 27.3]
    write(folder, refs, instances)
    examples, bad = task.read("validation")
    assert (examples[0].reference, bad) == ((0, 3, 40, 30), [])


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("ann_id", 999, "its ann_id 999 is unknown to"),
        ("ann_id", "102", "its ann_id '102' is unknown to"),
        ("ann_id", [999], "its ann_id 999 is unknown to"),
        ("ann_id", [101, 102], "it refers to 2 boxes; set any_number: true where that is meant"),
        ("ann_id", [], "it refers to 0 boxes; set any_number: true"),
        ("ann_id", None, "its ann_id is None; give an integer or a text"),
        ("ann_id", [[101]], "its ann_id is [101]; give an integer or a text"),
        ("image_id", 7, "its image_id is not 42, that of its annotation in"),
        ("split", None, "its split is None; give a text"),
        ("sentences", [], "its sentences is []; give a list with at least one object"),
        ("sentences", [{"sent_id": 20, "sent": ""}], "its sent is empty"),
        ("sentences", [{"sent_id": 10, "sent": "x"}], "its sent_id 10 is that of an earlier entry"),
        ("sentences", [{"sent": "x"}], "it has no 'sent_id'"),
        ("sentences", ["x"], "it is 'x'; give a JSON object"),
        ("ref_id", 1, "its ref_id 1 is that of an earlier entry"),
    ],
)
def test_read_reports_a_bad_ref(folder: Folder, task: Grounding, key: str, value: Any, reason: str) -> None:
    refs, instances = documents()
    refs[1][key] = value
    write(folder, refs, instances)
    examples, bad = task.read("validation")
    assert [example.prompt for example in examples] == ["where is left cat?", "where is cat {asleep}?"]
    assert [(one.file.name, one.reason[: len(reason)]) for one in bad] == [("refs.json", reason)]
    assert bad[0].entry.startswith("ref_id ")


@pytest.mark.parametrize("key", ["ref_id", "split", "sentences"])
def test_read_reports_a_ref_that_lacks(folder: Folder, task: Grounding, key: str) -> None:
    refs, instances = documents()
    del refs[1][key]
    write(folder, refs, instances)
    examples, bad = task.read("validation")
    assert len(examples) == 2
    assert [one.entry for one in bad] == ["entry[1]" if key == "ref_id" else "ref_id 2"]
    assert bad[0].reason.startswith(f"it has no '{key}'")


@pytest.mark.parametrize("key", ["ann_id", "image_id"])
def test_read_reports_a_ref_that_points_nowhere(folder: Folder, task: Grounding, key: str) -> None:
    refs, instances = documents()
    del refs[0][key]
    write(folder, refs, instances)
    examples, bad = task.read("validation")
    assert [example.prompt for example in examples] == ["where is the black one?"]
    assert [(one.entry, one.reason[: 14 + len(key)]) for one in bad] == [("ref_id 1", f"it has no '{key}'; ")]


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("file_name", "gone.png", "its picture"),
        ("file_name", "", "its file_name is empty"),
        ("width", 80, "its width is 80, but"),
        ("height", "30", "its height is '30', but"),
    ],
)
def test_read_reports_a_bad_image_once(folder: Folder, task: Grounding, key: str, value: Any, reason: str) -> None:
    refs, instances = documents()
    instances["images"][0][key] = value
    write(folder, refs, instances)
    examples, bad = task.read("validation")
    assert examples == []
    assert [(one.file.name, one.entry) for one in bad] == [("instances.json", "images id 42")]
    assert bad[0].reason.startswith(reason)


def test_read_reports_an_annotation_of_an_unknown_image(folder: Folder, task: Grounding) -> None:
    refs, instances = documents()
    del instances["images"][0]
    write(folder, refs, instances)
    examples, bad = task.read("validation")
    assert examples == []
    assert {(one.file.name, one.entry) for one in bad} == {
        ("instances.json", "annotations id 101"),
        ("instances.json", "annotations id 102"),
    }


def test_read_refuses_a_split_word_that_no_ref_has(folder: Folder, task: Grounding) -> None:
    write(folder, *documents())
    with pytest.raises(
        ValueError, match=r"refs.json: no entry is of split 'testA'; there are train, val. Set `splits`"
    ):
        task.read("test")


def test_read_refuses_files_without_their_lists(folder: Folder, task: Grounding) -> None:
    refs, instances = documents()
    write(folder, {"refs": refs}, instances)
    with pytest.raises(ValueError, match=r"refs.json: it is a dict; give a list"):
        task.read("validation")
    write(folder, refs, {"annotations": instances["annotations"]})
    with pytest.raises(ValueError, match=r"instances.json lacks 'images'"):
        task.read("validation")


def test_right_answers_score_one(folder: Folder, task: Grounding) -> None:
    write(folder, *documents())
    examples, _ = task.read("validation")
    metric = task.metrics()["box"]
    metric.update(
        [task.parse(example.answers[0], example) for example in examples], [example.reference for example in examples]
    )
    scores = metric.compute()
    assert scores[task.primary].item() == 1
    assert scores["mean_iou"].item() > 0.98


def generalised() -> tuple[Refs, Instances]:
    """As gRefCOCO has them: two objects, none, and one in a list."""
    refs, instances = documents()
    refs[0] |= {"ann_id": [101, 102], "category_id": [1, 1], "no_target": False}
    refs[1] |= {"ann_id": [-1], "category_id": [-1], "no_target": True}
    refs.append(
        refs[1] | {"ref_id": 4, "ann_id": [102], "no_target": False, "sentences": [{"sent_id": 40, "sent": "it"}]}
    )
    return refs, instances


def test_expressions_may_refer_to_any_number_of_boxes(folder: Folder, task: Grounding) -> None:
    write(folder, *generalised())
    task = task_on(folder, any_number=True)
    examples, bad = task.read("validation")
    both, one = [(4, 3, 14, 15.5), (20, 0, 40, 30)], [(20, 0, 40, 30)]
    assert bad == []
    assert [(example.prompt, example.reference) for example in examples] == [
        ("where is left cat?", both),
        ("where is cat {asleep}?", both),
        ("where is the black one?", []),
        ("where is it?", one),
    ]
    assert [example.answers for example in examples[1:]] == [
        ("[100, 100, 350, 516], [500, 0, 999, 999]",),
        ("none",),
        ("[500, 0, 999, 999]",),
    ]
    assert [example.pictures for example in examples] == [examples[0].pictures] * 4
    assert [task.parse(example.answers[0], example) for example in examples[2:]] == [
        [],
        [pytest.approx(one[0], abs=0.1)],
    ]
    assert task.parse("nowhere", examples[2]) is None


@pytest.mark.parametrize("ann_id", [[-1], -1, None, [], "left out"])
def test_an_expression_without_target_may_be_marked_in_any_way(folder: Folder, task: Grounding, ann_id: Any) -> None:
    refs, instances = generalised()
    refs[1]["ann_id"] = ann_id
    if ann_id == "left out":
        del refs[1]["ann_id"]
    write(folder, refs, instances)
    examples, bad = task_on(folder, any_number=True).read("validation")
    assert bad == []
    assert examples[2].reference == []


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"ann_id": [101], "no_target": True}, "it has no_target and points to annotations in ann_id"),
        ({"ann_id": [-1], "no_target": False}, "its ann_id -1 is unknown to"),
        ({"ann_id": [101, 999], "no_target": False}, "its ann_id 999 is unknown to"),
        ({"ann_id": [101, 103], "no_target": False}, "its image_id is not 7, that of its annotation in"),
        ({"image_id": 43}, "its image_id 43 is unknown to"),
        ({"image_id": None}, "its image_id is None"),
    ],
)
def test_read_reports_a_bad_generalised_ref(
    folder: Folder, task: Grounding, changes: dict[str, Any], reason: str
) -> None:
    refs, instances = generalised()
    refs[1] |= changes
    write(folder, refs, instances)
    examples, bad = task_on(folder, any_number=True).read("validation")
    assert len(examples) == 3
    assert [(one.entry, one.reason[: len(reason)]) for one in bad] == [("ref_id 2", reason)]


def test_an_annotation_named_twice_counts_once(folder: Folder, task: Grounding) -> None:
    refs, instances = generalised()
    refs[0]["ann_id"] = [102, 102]
    write(folder, refs, instances)
    examples, _ = task_on(folder, any_number=True).read("validation")
    assert examples[0].reference == [(20, 0, 40, 30)]


def test_a_box_that_the_base_does_not_see_is_its_annotations_defect(folder: Folder, task: Grounding) -> None:
    """Of 40 by 30 the middle square is seen, from 5 to 35; the box ends there, at 5."""
    refs, instances = generalised()
    instances["annotations"][0]["bbox"] = [0, 3, 5, 10]
    write(folder, refs, instances)
    codec = InternVLBoxes(view=CentreCrop(shortest=30, crop=30))
    examples, bad = task_on(folder, any_number=True, codec=codec).read("validation")
    assert [example.prompt for example in examples] == ["where is the black one?", "where is it?"]
    assert [one.entry for one in bad] == ["annotations id 101"]
    assert bad[0].reason.startswith(
        "its box cannot be written: of the box 0 to 5 across and 3 to 13 down nothing is seen"
    )


def test_a_box_is_written_as_seen_and_compared_whole(folder: Folder, task: Grounding) -> None:
    write(folder, *documents())
    examples, _ = task_on(folder, codec=InternVLBoxes(view=CentreCrop(shortest=30, crop=30))).read("validation")
    assert examples[0].reference == (4, 3, 14, 15.5)
    assert examples[0].answers == ("<ref>left cat</ref><box>[[0, 100, 300, 517]]</box>",)  # 5 to 14, 3 to 15.5, of 30


def test_an_expression_that_reads_as_a_box_is_its_sentences_defect(folder: Folder, task: Grounding) -> None:
    refs, instances = documents()
    refs[0]["sentences"][0]["sent"] = "the cat at [1, 2, 30, 40]"
    refs[0]["sentences"][1]["sent"] = "cat <3"
    write(folder, refs, instances)
    examples, bad = task_on(folder, codec=InternVLBoxes()).read("validation")
    assert [example.prompt for example in examples] == ["where is the black one?"]
    assert [(one.file.name, one.entry) for one in bad] == [
        ("refs.json", "ref_id 1, sent_id 10"),
        ("refs.json", "ref_id 1, sent_id 11"),
    ]
    assert bad[0].reason.startswith(
        "its answer cannot be written: the label 'the cat at [1, 2, 30, 40]' reads as a box"
    )


def test_right_answers_of_any_number_score_one(folder: Folder, task: Grounding) -> None:
    write(folder, *generalised())
    task = task_on(folder, any_number=True)
    examples, _ = task.read("validation")
    metric = task.metrics()["box"]
    metric.update(
        [task.parse(example.answers[0], example) for example in examples], [example.reference for example in examples]
    )
    scores = {name: value.item() for name, value in metric.compute().items()}
    assert scores == {task.primary: 1, "n_acc": 1, "t_acc": 1}
