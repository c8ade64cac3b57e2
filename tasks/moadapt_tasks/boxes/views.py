"""Views: which part of a picture an image processor shows to a base, and at which size.

Every processor cuts, pads and scales along the sides, so what it does is told by one rectangle of the picture and the
size at which that is shown. A view must say what the base's own processor does; its settings are those of the
processor's `preprocessor_config.json`.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass

from moadapt.registry import VIEWS

Box = tuple[float, float, float, float]
"""Left, top, right, bottom in pixels, the last two exclusive: a full picture is (0, 0, width, height)."""


class CannotWrite(ValueError):
    """A convention cannot write a box; the message says why."""


@dataclass(frozen=True)
class Frame:
    """What a base sees of a picture.

    Args:
        box: The part that is shown, in pixels of the picture; padding reaches out of it.
        size: Width and height at which that part is shown, in pixels.
    """

    box: Box
    size: tuple[int, int]

    def fractions(self, box: Box) -> Box:
        """Return a box of the picture in fractions of the frame's sides, cut to what is seen."""
        left, top, right, bottom = self.box
        width, height = right - left, bottom - top
        return cut(
            ((box[0] - left) / width, (box[1] - top) / height, (box[2] - left) / width, (box[3] - top) / height), 1, 1
        )

    def pixels(self, fractions: Box) -> Box:
        """Return fractions of the frame's sides as a box in pixels of the picture."""
        left, top, right, bottom = self.box
        width, height = right - left, bottom - top
        return (
            left + fractions[0] * width,
            top + fractions[1] * height,
            left + fractions[2] * width,
            top + fractions[3] * height,
        )


def cut(box: Box, width: float, height: float) -> Box:
    """Return a box with every edge moved between 0 and its side."""
    left, right = (min(max(edge, 0.0), width) for edge in (box[0], box[2]))
    top, bottom = (min(max(edge, 0.0), height) for edge in (box[1], box[3]))
    return left, top, right, bottom


class View(ABC):
    """Says what a base sees of a picture."""

    @abstractmethod
    def frame(self, size: tuple[int, int]) -> Frame:
        """Return what the base sees.

        Args:
            size: Width and height of the picture, in pixels.

        Raises:
            CannotWrite: The processor refuses pictures of this size.
        """


@VIEWS.register("whole")
@dataclass(frozen=True)
class WholePicture(View):
    """All of the picture, stretched to a fixed size or tiled (SigLIP, InternVL, Florence-2, Kosmos-2)."""

    def frame(self, size: tuple[int, int]) -> Frame:
        """Return the picture itself."""
        return Frame((0, 0, size[0], size[1]), size)


@VIEWS.register("centre_crop")
@dataclass(frozen=True, kw_only=True)
class CentreCrop(View):
    """The middle square of a picture whose shorter side was scaled to a fixed length (CLIP, LLaVA-1.5).

    Args:
        shortest: The processor's `size.shortest_edge`, in pixels.
        crop: The processor's `crop_size`, height and width, in pixels; up to `shortest`.

    Raises:
        ValueError: A setting is out of range.
    """

    shortest: int = 336
    crop: int = 336

    def __post_init__(self) -> None:
        """Check the settings."""
        if not 1 <= self.crop <= self.shortest:
            raise ValueError(f"`crop` is {self.crop}; give 1 up to `shortest`, which is {self.shortest}")

    def frame(self, size: tuple[int, int]) -> Frame:
        """Return the middle square."""
        width, height = size
        longer = int(self.shortest * max(size) / min(size))  # cut, not rounded, as transformers does
        shown = (self.shortest, longer) if width <= height else (longer, self.shortest)
        left, top = ((side - self.crop) // 2 for side in shown)
        across, down = width / shown[0], height / shown[1]
        box = (left * across, top * down, (left + self.crop) * across, (top + self.crop) * down)
        return Frame(box, (self.crop, self.crop))


@VIEWS.register("padded_square")
@dataclass(frozen=True)
class PaddedSquare(View):
    """The picture in the middle of the smallest square around it (Shikra, LLaVA-1.5 with `do_pad`)."""

    def frame(self, size: tuple[int, int]) -> Frame:
        """Return the square."""
        side = max(size)
        left, top = (-((side - own) // 2) for own in size)
        return Frame((left, top, left + side, top + side), (side, side))
