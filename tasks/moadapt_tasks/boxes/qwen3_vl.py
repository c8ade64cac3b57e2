"""Qwen3-VL: thousandths of the picture's sides.

Source: the 2D grounding cookbook of Qwen3-VL, which divides by 1000, and QwenLM/Qwen3-VL issues 1486 and 1623.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from moadapt.registry import CODECS
from moadapt_tasks.boxes.bbox_2d import NOTHING, write_list
from moadapt_tasks.boxes.bracketed import find_numbers
from moadapt_tasks.boxes.codec import BoxCodec
from moadapt_tasks.boxes.views import Box, View, WholePicture

_STEPS = (1000, 1000)


@CODECS.register("qwen3_vl")
@dataclass(frozen=True, kw_only=True)
class Qwen3VLBoxes(BoxCodec):
    """Qwen3-VL: JSON with `bbox_2d` in integers 0 to 1000.

    Args:
        view: What the base sees of a picture.
    """

    view: View = field(default_factory=WholePicture)
    nothing: ClassVar[str] = NOTHING

    def steps(self, size: tuple[int, int]) -> tuple[int, int]:
        """Return 1000 twice, whatever the size."""
        return _STEPS

    def spell(self, boxes: Sequence[Box], size: tuple[int, int], label: str) -> str:
        """Return a fenced JSON list."""
        return write_list(boxes, _STEPS, label)

    def find(self, text: str, size: tuple[int, int]) -> list[Box]:
        """Return every four numbers in brackets, whether or not the JSON around them is whole."""
        return find_numbers(text, _STEPS)
