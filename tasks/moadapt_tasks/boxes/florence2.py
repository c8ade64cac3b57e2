"""Florence-2: four location tokens of 1000 bins a box, left before top.

Source: `Florence2PostProcessor` of transformers, whose `quantize` takes the bin that an edge falls into and whose
`dequantize` takes the bin's middle (here without cutting to whole pixels).
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from moadapt.registry import CODECS
from moadapt_tasks.boxes.codec import BoxCodec
from moadapt_tasks.boxes.views import Box, View, WholePicture

_BINS = 1000
_FOUR = re.compile(r"\s*".join([r"<loc_(\d{1,4})>"] * 4))


@CODECS.register("florence2")
@dataclass(frozen=True, kw_only=True)
class Florence2Boxes(BoxCodec):
    """Florence-2: `cat<loc_108><loc_234><loc_500><loc_750>` as left, top, right, bottom; boxes follow each other.

    Args:
        view: What the base sees of a picture.
    """

    view: View = field(default_factory=WholePicture)
    marks: ClassVar[str] = "<>"

    def steps(self, size: tuple[int, int]) -> tuple[int, int]:
        """Return 1000 twice, whatever the size."""
        return _BINS, _BINS

    def spell(self, boxes: Sequence[Box], size: tuple[int, int], label: str) -> str:
        """Return the label and the tokens of all boxes."""
        bins = (min(math.floor(edge * _BINS), _BINS - 1) for box in boxes for edge in box)
        return label + "".join(f"<loc_{bin}>" for bin in bins)

    def find(self, text: str, size: tuple[int, int]) -> list[Box]:
        """Return every four location tokens in a row."""
        fours = ([(int(bin) + 0.5) / _BINS for bin in four.groups()] for four in _FOUR.finditer(text))
        return [(left, top, right, bottom) for left, top, right, bottom in fours]
