"""PaliGemma: four location tokens of 1024 bins a box, top before left.

Source: `EXTRA_TOKENS` of transformers' `processing_paligemma`, and big_vision, which rounds an edge to a 1023rd of its
side (`pp/proj/paligemma/segmentation.py`) and reads it so (`evaluators/proj/paligemma/transfers/segmentation.py`).
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from moadapt.registry import CODECS
from moadapt_tasks.boxes.codec import BoxCodec
from moadapt_tasks.boxes.views import Box, View, WholePicture

_STEPS = 1023
_FOUR = re.compile(r"\s*".join([r"<loc(\d{4})>"] * 4))


@CODECS.register("paligemma")
@dataclass(frozen=True, kw_only=True)
class PaliGemmaBoxes(BoxCodec):
    """PaliGemma: `<loc0239><loc0111><loc0768><loc0512> cat` as top, left, bottom, right; boxes are joined by ` ; `.

    Args:
        view: What the base sees of a picture.
    """

    view: View = field(default_factory=WholePicture)
    marks: ClassVar[str] = "<>;"

    def steps(self, size: tuple[int, int]) -> tuple[int, int]:
        """Return 1023 twice, whatever the size."""
        return _STEPS, _STEPS

    def spell(self, boxes: Sequence[Box], size: tuple[int, int], label: str) -> str:
        """Return every box with its label."""
        return " ; ".join(f"{_tokens(box)} {label}".rstrip() for box in boxes)

    def find(self, text: str, size: tuple[int, int]) -> list[Box]:
        """Return every four location tokens in a row."""
        fours = ([int(bin) / _STEPS for bin in four.groups()] for four in _FOUR.finditer(text))
        return [(left, top, right, bottom) for top, left, bottom, right in fours]


def _tokens(box: Box) -> str:
    left, top, right, bottom = box
    return "".join(f"<loc{round(edge * _STEPS):04d}>" for edge in (top, left, bottom, right))
