"""What a box convention is: boxes in pixels to the text a base is trained on, and back from what it generates.

The work that all conventions share stands here: the processor's resize and crop, boxes cut to what is seen, the answer
where there is no box, and reading leniently. A convention says only how boxes are spelled and found.
"""

import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

from moadapt_tasks.boxes.views import Box, CannotWrite, View, cut

_NOTHING = re.compile(r"\bnone\b|\[\s*\]", re.IGNORECASE)
"""What says that there is no box: the word, or an empty list."""


class BoxCodec(ABC):
    """Writes boxes as text and reads them back."""

    view: View
    """What the base sees of a picture."""
    nothing: ClassVar[str] = "none"
    """The text that stands for no box at all."""
    marks: ClassVar[str] = ""
    """Characters that mean something to the convention, so that no label may hold them."""

    def write(self, boxes: Sequence[Box], size: tuple[int, int], label: str) -> str:
        """Return the text of boxes.

        Args:
            boxes: Any number, in pixels of the picture; they are cut to what the base sees.
            size: Width and height of the picture, in pixels.
            label: What they show, for conventions that repeat it.

        Raises:
            CannotWrite: A box cannot be seen or is too small, or the label would be read as something else.
        """
        if not boxes:
            return self.nothing
        if any(mark in label for mark in self.marks):
            raise CannotWrite(f"the label {label!r} holds one of {self.marks!r}, which mark boxes; take it out")
        frame = self.view.frame(size)
        seen = [frame.fractions(box) for box in boxes]
        for box, part in zip(boxes, seen, strict=True):
            if not _has_area(part):
                raise CannotWrite(f"of the box {_shown(box)} nothing is seen, only {_shown(frame.box)}; leave it out")
        text = self.spell(seen, frame.size, label)
        count = len(self.read(text, size) or ())
        if count < len(boxes):
            raise CannotWrite(f"a box is too small: {text!r} has one without area; leave it out")
        if count > len(boxes):
            raise CannotWrite(f"the label {label!r} reads as a box; take the numbers out")
        return text

    def read(self, text: str, size: tuple[int, int]) -> list[Box] | None:
        """Return the boxes of a text, in pixels of the picture; None where it tells of none, nor that there is none.

        Corners may be swapped and edges out of range, which are cut; boxes without area are left out.

        Args:
            text: What a base wrote.
            size: Width and height of the picture, in pixels.
        """
        frame = self.view.frame(size)
        found = [cut(_ordered(box), 1, 1) for box in self.find(text, frame.size)]
        boxes = [box for box in (cut(frame.pixels(box), *size) for box in found) if _has_area(box)]
        return boxes if boxes or (not found and _NOTHING.search(text)) else None

    @abstractmethod
    def steps(self, size: tuple[int, int]) -> tuple[int, int]:
        """Return how many steps the convention counts across and down what the base sees.

        What was written is read back within half a step.

        Args:
            size: Width and height at which the base sees it, in pixels.
        """

    @abstractmethod
    def spell(self, boxes: Sequence[Box], size: tuple[int, int], label: str) -> str:
        """Return the text of at least one box.

        Args:
            boxes: In fractions of the sides of what the base sees, 0 to 1.
            size: Width and height at which it sees that, in pixels.
            label: What they show.
        """

    @abstractmethod
    def find(self, text: str, size: tuple[int, int]) -> list[Box]:
        """Return the boxes of a text in fractions of the sides, in any order of corners and of any range.

        Args:
            text: What a base wrote.
            size: Width and height at which it saw the picture, in pixels.
        """


def _ordered(box: Box) -> Box:
    return min(box[0], box[2]), min(box[1], box[3]), max(box[0], box[2]), max(box[1], box[3])


def _has_area(box: Box) -> bool:
    return box[0] < box[2] and box[1] < box[3]


def _shown(box: Box) -> str:
    return f"{box[0]:g} to {box[2]:g} across and {box[1]:g} to {box[3]:g} down"
