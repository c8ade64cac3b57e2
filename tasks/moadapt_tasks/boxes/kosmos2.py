"""Kosmos-2: the cells of a 32 by 32 grid that hold a box's upper left and lower right corner.

Source: Peng et al. 2023, "Kosmos-2", arXiv:2306.14824, section 2; `coordinate_to_patch_index` and
`patch_index_to_coordinate` of transformers' `processing_kosmos2`. Like there, corners are read as the middles of their
cells, and a box within one column or row as the whole of it. Unlike there, only on the side on which it is that small:
transformers then takes whole cells on both sides, which moves the other side's edges by up to a cell.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from moadapt.registry import CODECS
from moadapt_tasks.boxes.codec import BoxCodec
from moadapt_tasks.boxes.views import Box, View, WholePicture

_GRID = 32
_TWO = re.compile(r"<patch_index_(\d{1,4})>\s*<patch_index_(\d{1,4})>")
_BETWEEN = "</delimiter_of_multi_objects/>"


@CODECS.register("kosmos2")
@dataclass(frozen=True, kw_only=True)
class Kosmos2Boxes(BoxCodec):
    """Kosmos-2: `<phrase>cat</phrase><object><patch_index_0044><patch_index_0863></object>`, cells of a 32 by 32 grid.

    Args:
        view: What the base sees of a picture.
    """

    view: View = field(default_factory=WholePicture)
    marks: ClassVar[str] = "<>"

    def steps(self, size: tuple[int, int]) -> tuple[int, int]:
        """Return 32 twice, whatever the size; a side within one cell is read back within a whole step only."""
        return _GRID, _GRID

    def spell(self, boxes: Sequence[Box], size: tuple[int, int], label: str) -> str:
        """Return the label and two cells a box."""
        return f"<phrase>{label}</phrase><object>{_BETWEEN.join(map(_tokens, boxes))}</object>"

    def find(self, text: str, size: tuple[int, int]) -> list[Box]:
        """Return every two cells in a row."""
        pairs = ([divmod(int(index), _GRID) for index in two.groups()] for two in _TWO.finditer(text))
        return [_box(first, second) for first, second in pairs]


def _tokens(box: Box) -> str:
    left, top = (math.floor(edge * _GRID) for edge in box[:2])
    right, bottom = (math.ceil(edge * _GRID - 1) for edge in box[2:])
    cells = top * _GRID + left, max(bottom, top) * _GRID + max(right, left)
    return "".join(f"<patch_index_{cell:04d}>" for cell in cells)


def _box(first: tuple[int, int], second: tuple[int, int]) -> Box:
    (top, bottom), (left, right) = (_span(a, b) for a, b in zip(first, second, strict=True))
    return left, top, right, bottom


def _span(one: int, other: int) -> tuple[float, float]:
    """Return where two cells of a side begin and end, in fractions of it."""
    if one == other:
        return one / _GRID, (one + 1) / _GRID
    return (one + 0.5) / _GRID, (other + 0.5) / _GRID
