from collections.abc import Mapping
from contextlib import suppress
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import pytest

from moadapt.registry import TASKS
from moadapt.task import Defect
from moadapt_tasks.patterns import check_splits, check_template, picture_path
from moadapt_tasks.records import Record

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


FIELDS = ("image_id", "image", "file_name", "filename", "name", "vid_name")
"""What the patterns of pictures and frames may mention, each in some task."""


def smallest(task: type[Any]) -> dict[str, Any]:
    """Settings that a task needs, each with a value that it accepts."""
    needed = [field.name for field in fields(task) if field.default is MISSING and field.default_factory is MISSING]
    settings = dict.fromkeys(needed, "some.json")
    pattern = next((name for name in ("images", "frames") if name in settings), None)
    for name in FIELDS if pattern else ():
        settings[pattern] = f"{{{name}}}"
        with suppress(ValueError):
            task(**settings)
            return settings
    return settings


@pytest.mark.parametrize(("name", "value"), [("limit", 0), ("max_new_tokens", 0), ("splits", {})])
@pytest.mark.parametrize("short", TASKS.names())
def test_every_task_refuses(short: str, name: str, value: object) -> None:
    task = TASKS.get(short)
    with pytest.raises(ValueError, match=f"`{name}`"):
        task(**smallest(task) | {name: value})


@pytest.mark.parametrize("short", TASKS.names())
def test_every_task_that_finds_pictures_refuses_one_pattern_for_all(short: str) -> None:
    task = TASKS.get(short)
    for name in {"images", "frames"} & set(smallest(task)):
        with pytest.raises(ValueError, match=f"`{name}` is 'one.png'; give a template of"):
            task(**smallest(task) | {name: "one.png"})
