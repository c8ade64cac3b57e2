"""Boxes of data files, as left, top, right, bottom in pixels of their picture, and their text."""

from collections.abc import Sequence
from pathlib import Path

from moadapt_tasks.boxes import Box, BoxCodec, CannotWrite
from moadapt_tasks.records import Record

_ROUNDING = 0.5
"""How far a box may reach out of its picture, in pixels; it is cut back."""


def box_from_size(record: Record, key: str, size: tuple[int, int]) -> Box:
    """Return a box that is written as left, top, width, height, cut to its picture.

    Args:
        record: An entry with the four numbers.
        key: Where they stand.
        size: Width and height of its picture, in pixels.

    Raises:
        Defect: The box has no area, or reaches out of the picture by more than rounding.
    """
    left, top, width, height = record.numbers(key, 4)
    if width <= 0 or height <= 0:
        raise record.wrong(f"its {key} is {width:g} wide and {height:g} high; give left, top, width, height above 0")
    return box_inside(record, key, (left, top, left + width, top + height), size, "left, top, width, height")


def box_from_corners(record: Record, key: str, size: tuple[int, int]) -> Box:
    """Return a box that is written as left, top, right, bottom, cut to its picture.

    Args:
        record: An entry with the four numbers.
        key: Where they stand.
        size: Width and height of its picture, in pixels.

    Raises:
        Defect: The box has no area, or reaches out of the picture by more than rounding.
    """
    left, top, right, bottom = record.numbers(key, 4)
    if left >= right or top >= bottom:
        raise record.wrong(
            f"its {key} goes from {left:g} to {right:g} and {top:g} to {bottom:g}; give left, top, right, bottom, the "
            "last two greater"
        )
    return box_inside(record, key, (left, top, right, bottom), size, "left, top, right, bottom")


def box_inside(
    record: Record, key: str, box: Box, size: tuple[int, int], form: str, tolerance: float = _ROUNDING
) -> Box:
    """Return a box cut to its picture.

    Args:
        record: The entry that holds it.
        key: What the entry calls it.
        box: In pixels, with an area.
        size: Width and height of its picture, in pixels.
        form: How the entry writes boxes, for the message.
        tolerance: How far it may reach out of the picture, in pixels.

    Raises:
        Defect: It reaches out farther, or nothing of it is in the picture.
    """
    left, top, right, bottom = box
    outside = max(-left, -top, right - size[0], bottom - size[1])
    within = max(left, 0.0), max(top, 0.0), min(right, float(size[0])), min(bottom, float(size[1]))
    if outside > tolerance or within[0] >= within[2] or within[1] >= within[3]:
        raise record.wrong(
            f"its {key} spans {left:g} to {right:g} and {top:g} to {bottom:g}, outside its picture of {size[0]} by "
            f"{size[1]} pixels; give {form} within it"
        )
    return within


def check_size(record: Record, size: tuple[int, int], path: Path) -> None:
    """Require that boxes were drawn on a picture of this size.

    Args:
        record: What may say a `width` and a `height`.
        size: The picture's, in pixels.
        path: The picture.

    Raises:
        Defect: It says another size.
    """
    for key, found in (("width", size[0]), ("height", size[1])):
        said = record.values.get(key, found)
        if said != found:
            raise record.wrong(f"its {key} is {said!r}, but {path} has {found}; use the one that the boxes belong to")


def box_text(
    codec: BoxCodec, boxes: Sequence[tuple[Record, Box]], size: tuple[int, int], label: str, asking: Record
) -> str:
    """Return the text of boxes; a box that cannot be written is the defect of the entry that holds it.

    Args:
        codec: How boxes are written.
        boxes: Each box, in pixels, beside the entry that holds it.
        size: Width and height of the picture, in pixels.
        label: What they show.
        asking: The entry that they answer.

    Raises:
        Defect: They cannot be written.
    """
    try:
        return codec.write([box for _, box in boxes], size, label)
    except CannotWrite as error:
        for holder, box in boxes:
            _check_alone(codec, holder, box, size)
        raise asking.wrong(f"its answer cannot be written: {error}") from error


def _check_alone(codec: BoxCodec, holder: Record, box: Box, size: tuple[int, int]) -> None:
    try:
        codec.write([box], size, "")
    except CannotWrite as error:
        raise holder.wrong(f"its box cannot be written: {error}") from error
