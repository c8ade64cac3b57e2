"""Shikra: decimals 0 to 1 of the square into which the picture is padded.

Source: Chen et al. 2023, "Shikra", arXiv:2306.15195; `PlainBoxFormatter` and `Expand2square` of its repository.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from moadapt.registry import CODECS
from moadapt_tasks.boxes.bracketed import find_numbers
from moadapt_tasks.boxes.codec import BoxCodec
from moadapt_tasks.boxes.views import Box, PaddedSquare, View


@CODECS.register("shikra")
@dataclass(frozen=True, kw_only=True)
class ShikraBoxes(BoxCodec):
    """Shikra: decimals 0 to 1, `[0.109,0.234,0.500,0.750]`; boxes are joined by `;` within the brackets.

    Args:
        digits: Digits behind the point, 1 to 6: 3 for Shikra, 2 for LLaVA-1.5.
        view: What the base sees of a picture.

    Raises:
        ValueError: `digits` is out of range.
    """

    digits: int = 3
    view: View = field(default_factory=PaddedSquare)

    def __post_init__(self) -> None:
        """Check the settings."""
        if not 1 <= self.digits <= 6:
            raise ValueError(f"`digits` is {self.digits}; give 1 to 6 digits behind the point (Shikra writes 3)")

    def steps(self, size: tuple[int, int]) -> tuple[int, int]:
        """Return what the digits can count, whatever the size."""
        return 10**self.digits, 10**self.digits

    def spell(self, boxes: Sequence[Box], size: tuple[int, int], label: str) -> str:
        """Return all boxes in one pair of brackets."""
        return "[" + ";".join(",".join(f"{edge:.{self.digits}f}" for edge in box) for box in boxes) + "]"

    def find(self, text: str, size: tuple[int, int]) -> list[Box]:
        """Return every four numbers in brackets."""
        return find_numbers(text, (1, 1))
