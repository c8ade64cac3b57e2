"""Boxes as text: one codec object a convention.

A codec writes a pixel box into the text a model is trained on and reads the first box back from generated text.
Pixel boxes are (left, top, right, bottom), the last two exclusive, so a full image is (0, 0, width, height).
"""

import re
from abc import ABC, abstractmethod
from dataclasses import dataclass

Box = tuple[float, float, float, float]


class BoxCodec(ABC):
    """Writes pixel boxes as text and reads them back."""

    @abstractmethod
    def write(self, box: Box, width: int, height: int) -> str:
        """Return the text of a pixel box in an image of the given size."""

    @abstractmethod
    def read(self, text: str, width: int, height: int) -> Box | None:
        """Return the first box in a text as pixels, or None where there is none."""


@dataclass(frozen=True)
class IntegerBoxes(BoxCodec):
    """Integers 0 to 999 over the image's sides: `[109, 234, 500, 750]` (left, top, right, bottom)."""

    def write(self, box: Box, width: int, height: int) -> str:
        """Return `[left, top, right, bottom]`, each edge rounded to a 999th of its side."""
        return "[" + ", ".join(str(round(edge)) for edge in _scale(box, 999 / width, 999 / height)) + "]"

    def read(self, text: str, width: int, height: int) -> Box | None:
        """Return the first bracketed four integers up to 999 as a pixel box, or None."""
        found = re.search(r"\[\s*(\d{1,3})\s*,\s*(\d{1,3})\s*,\s*(\d{1,3})\s*,\s*(\d{1,3})\s*\]", text)
        if found is None:
            return None
        left, top, right, bottom = (float(edge) for edge in found.groups())
        return _ordered(_scale((left, top, right, bottom), width / 999, height / 999))


@dataclass(frozen=True)
class LocationTokens(BoxCodec):
    """Four `<locNNNN>` tokens of 1024 steps, in PaliGemma's order: top, left, bottom, right."""

    def write(self, box: Box, width: int, height: int) -> str:
        """Return `<loctop><locleft><locbottom><locright>`, each edge floored to a 1024th of its side."""
        left, top, right, bottom = _scale(box, 1024 / width, 1024 / height)
        return "".join(f"<loc{min(1023, max(0, int(edge))):04d}>" for edge in (top, left, bottom, right))

    def read(self, text: str, width: int, height: int) -> Box | None:
        """Return the first four consecutive location tokens as a pixel box, or None."""
        found = re.search(r"<loc(\d{4})>\s*<loc(\d{4})>\s*<loc(\d{4})>\s*<loc(\d{4})>", text)
        if found is None:
            return None
        top, left, bottom, right = (float(edge) for edge in found.groups())
        if max(top, left, bottom, right) > 1023:
            return None
        return _ordered(_scale((left, top, right, bottom), width / 1024, height / 1024))


def _scale(box: Box, horizontal: float, vertical: float) -> Box:
    return box[0] * horizontal, box[1] * vertical, box[2] * horizontal, box[3] * vertical


def _ordered(box: Box) -> Box | None:
    return box if box[0] < box[2] and box[1] < box[3] else None
