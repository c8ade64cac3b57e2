"""InternVL: thousandths of the picture's sides, between marks.

Source: "Chat Data Format" of InternVL's documentation, and `internvl_chat/eval/refcoco/evaluate_grounding.py`, which
divides by 1000.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from moadapt.registry import CODECS
from moadapt_tasks.boxes.bracketed import find_numbers, write_numbers
from moadapt_tasks.boxes.codec import BoxCodec
from moadapt_tasks.boxes.views import Box, View, WholePicture

_STEPS = (1000, 1000)


@CODECS.register("internvl")
@dataclass(frozen=True, kw_only=True)
class InternVLBoxes(BoxCodec):
    """InternVL: `<ref>cat</ref><box>[[109, 234, 500, 750]]</box>` in integers 0 to 1000.

    Args:
        view: What the base sees of a picture; its tiles together show all of it.
    """

    view: View = field(default_factory=WholePicture)
    marks: ClassVar[str] = "<>"

    def steps(self, size: tuple[int, int]) -> tuple[int, int]:
        """Return 1000 twice, whatever the size."""
        return _STEPS

    def spell(self, boxes: Sequence[Box], size: tuple[int, int], label: str) -> str:
        """Return the label and a list of boxes."""
        lists = ", ".join(write_numbers(box, _STEPS) for box in boxes)
        return f"<ref>{label}</ref><box>[{lists}]</box>"

    def find(self, text: str, size: tuple[int, int]) -> list[Box]:
        """Return every four numbers in brackets, with or without the marks, which are special tokens."""
        return find_numbers(text, _STEPS)
