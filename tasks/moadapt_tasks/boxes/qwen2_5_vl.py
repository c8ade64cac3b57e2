"""Qwen2.5-VL: pixels of the picture as the processor resizes it, not of the picture itself.

Source: the maintainers' answers in QwenLM/Qwen3-VL issues 676 and 1035 (boxes are in pixels of the resized picture and
may reach out of it) and the spatial understanding cookbook of Qwen2.5-VL.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from moadapt.registry import CODECS
from moadapt_tasks.boxes.bbox_2d import NOTHING, write_list
from moadapt_tasks.boxes.bracketed import find_numbers
from moadapt_tasks.boxes.codec import BoxCodec
from moadapt_tasks.boxes.smart_resize import SmartResize
from moadapt_tasks.boxes.views import Box, View


@CODECS.register("qwen2_5_vl")
@dataclass(frozen=True, kw_only=True)
class Qwen25VLBoxes(BoxCodec):
    """Qwen2.5-VL: JSON with `bbox_2d` in pixels of the resized picture.

    Args:
        view: What the base sees of a picture; `whole` gives pixels of the picture itself.
    """

    view: View = field(default_factory=SmartResize)
    nothing: ClassVar[str] = NOTHING

    def steps(self, size: tuple[int, int]) -> tuple[int, int]:
        """Return the size."""
        return size

    def spell(self, boxes: Sequence[Box], size: tuple[int, int], label: str) -> str:
        """Return a fenced JSON list."""
        return write_list(boxes, size, label)

    def find(self, text: str, size: tuple[int, int]) -> list[Box]:
        """Return every four numbers in brackets, whether or not the JSON around them is whole."""
        return find_numbers(text, size)
