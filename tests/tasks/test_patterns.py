from collections.abc import Mapping
from pathlib import Path

import pytest

from moadapt.task import Defect
from moadapt_tasks.captioning import Captioning
from moadapt_tasks.grounding import Grounding
from moadapt_tasks.patterns import check_splits, check_template, picture_path
from moadapt_tasks.records import Record
from moadapt_tasks.vqa import VQA

ENTRY = Record(Path("some.json"), "id 1", {})


@pytest.mark.parametrize("template", ["{question", "{}", "{answer}", "{question.x}", "no question"])
def test_check_template_refuses(template: str) -> None:
    with pytest.raises(ValueError, match=r"`prompt` is .*template"):
        check_template("prompt", template, ["question"], ["question"])


def test_check_template_accepts_format_specifications_and_literal_braces() -> None:
    check_template("images", "{{x}}/{split}/{image_id:012d}.jpg", ["split", "image_id"], ["image_id"])


@pytest.mark.parametrize("splits", [{}, {"val": "val2014"}, {"train": "train2014", "dev": "val2014"}])
def test_check_splits_refuses(splits: Mapping[str, str]) -> None:
    with pytest.raises(ValueError, match="give words for some of train, validation, test"):
        check_splits(splits)


def test_picture_path_pads_integers() -> None:
    path = picture_path("{split}/COCO_{split}_{image_id:012d}.jpg", ENTRY, split="val2014", image_id=42)
    assert path == Path("val2014/COCO_val2014_000000000042.jpg")


def test_picture_path_reports_a_text_that_cannot_be_padded() -> None:
    with pytest.raises(Defect, match=r"image_id 'x1' does not fit `images` '\{image_id:012d\}.jpg'"):
        picture_path("{image_id:012d}.jpg", ENTRY, split="train", image_id="x1")


@pytest.mark.parametrize(
    ("name", "value"), [("limit", 0), ("max_new_tokens", 0), ("splits", {}), ("images", "{split}.png")]
)
def test_every_task_refuses(name: str, value: object) -> None:
    setting = {name: value}
    with pytest.raises(ValueError, match=f"`{name}`"):
        VQA(**{"questions": "q", "annotations": "a", "images": "{image_id}"} | setting)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=f"`{name}`"):
        Captioning(**{"captions": "c", "images": "{file_name}"} | setting)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=f"`{name}`"):
        Grounding(**{"refs": "r", "instances": "i", "images": "{file_name}"} | setting)  # type: ignore[arg-type]
