"""Four numbers in brackets, `[left, top, right, bottom]`, as models really write them.

Brackets may be round, numbers quoted or followed by a comma too many, and the two corners may have brackets of their
own: `(left, top), (right, bottom)`. What is not closed is not read, since its last number may be cut short.
"""

import re
from collections.abc import Iterator

from moadapt_tasks.boxes.views import Box

_GROUP = re.compile(r"[\[(]([^\[\]()]*)[\])]")
_NUMBER = re.compile(r"[-+]?(?:\d+\.?\d*|\.\d+)")
_GAP = re.compile(r"\s*,\s*|\s+")
_BETWEEN = re.compile(r"[\s,]*")
_QUOTES = str.maketrans("", "", "\"'")


def write_numbers(box: Box, steps: tuple[int, int]) -> str:
    """Return `[left, top, right, bottom]` in whole steps.

    Args:
        box: In fractions of the sides.
        steps: How many there are from left to right, and from top to bottom.
    """
    return str([round(edge * count) for edge, count in zip(box, steps * 2, strict=True)])


def find_numbers(text: str, steps: tuple[int, int]) -> list[Box]:
    """Return every four numbers in brackets, in fractions of the sides.

    Args:
        text: Any text.
        steps: How many there are from left to right, and from top to bottom.
    """
    across, down = steps
    return [(box[0] / across, box[1] / down, box[2] / across, box[3] / down) for box in _fours(text)]


def _fours(text: str) -> Iterator[Box]:
    """Find four numbers in one pair of brackets, or two and two in neighbours."""
    corner: list[float] = []
    end = 0
    for group in _GROUP.finditer(text):
        near = _BETWEEN.fullmatch(text, end, group.start()) is not None
        end = group.end()
        lists = [_numbers(part) for part in group[1].split(";")]
        for numbers in lists:
            if len(numbers) == 4:
                yield numbers[0], numbers[1], numbers[2], numbers[3]
        pair = lists[0] if len(lists) == 1 and len(lists[0]) == 2 else []
        if pair and corner and near:
            yield corner[0], corner[1], pair[0], pair[1]
            pair = []
        corner = pair


def _numbers(text: str) -> list[float]:
    """Return the numbers of a list; none where it holds anything else."""
    words = _GAP.split(text.translate(_QUOTES).strip().removesuffix(",").rstrip())
    return [float(word) for word in words] if all(_NUMBER.fullmatch(word) for word in words) else []
