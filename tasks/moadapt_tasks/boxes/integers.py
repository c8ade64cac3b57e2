"""Plain integers from 0 to 999, with no model's marks around them."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from moadapt.registry import CODECS
from moadapt_tasks.boxes.bracketed import find_numbers, write_numbers
from moadapt_tasks.boxes.codec import BoxCodec
from moadapt_tasks.boxes.views import Box, View, WholePicture

_STEPS = (999, 999)


@CODECS.register("integers")
@dataclass(frozen=True, kw_only=True)
class IntegerBoxes(BoxCodec):
    """Integers 0 to 999: `[109, 234, 500, 750]`, for bases that know no convention of their own.

    Args:
        view: What the base sees of a picture.
    """

    view: View = field(default_factory=WholePicture)

    def steps(self, size: tuple[int, int]) -> tuple[int, int]:
        """Return 999 twice, whatever the size."""
        return _STEPS

    def spell(self, boxes: Sequence[Box], size: tuple[int, int], label: str) -> str:
        """Return the boxes, each in brackets, joined by commas."""
        return ", ".join(write_numbers(box, _STEPS) for box in boxes)

    def find(self, text: str, size: tuple[int, int]) -> list[Box]:
        """Return every four numbers in brackets."""
        return find_numbers(text, _STEPS)
