"""The view of the Qwen-VL processors: all of the picture, each side near its own length and a multiple of a factor."""

import math
from dataclasses import dataclass

from moadapt.registry import VIEWS
from moadapt_tasks.boxes.views import CannotWrite, Frame, View

_LONGEST = 200
"""Pictures that are more times longer than wide are refused by the processors."""


def smart_size(size: tuple[int, int], factor: int, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    """Return the width and height at which a picture is shown; equal to `smart_resize` of transformers' `qwen2_vl`.

    Args:
        size: Width and height of the picture, in pixels.
        factor: Both are multiples of it.
        min_pixels: Least area, in pixels.
        max_pixels: Largest area, in pixels.
    """
    near = [round(side / factor) * factor for side in size]
    area = size[0] * size[1]
    if near[0] * near[1] > max_pixels:
        shrink = math.sqrt(area / max_pixels)
        near = [max(factor, math.floor(side / shrink / factor) * factor) for side in size]
    elif near[0] * near[1] < min_pixels:
        grow = math.sqrt(min_pixels / area)
        near = [math.ceil(side * grow / factor) * factor for side in size]
    return near[0], near[1]


@VIEWS.register("smart_resize")
@dataclass(frozen=True, kw_only=True)
class SmartResize(View):
    """All of the picture, near its own size (Qwen2-VL, Qwen2.5-VL, Qwen3-VL).

    Args:
        factor: Patch size times merge size: 28 for Qwen2.5-VL, 32 for Qwen3-VL.
        min_pixels: The processor's `min_pixels`, or its `size.shortest_edge`.
        max_pixels: The processor's `max_pixels`, or its `size.longest_edge`.

    Raises:
        ValueError: A setting is out of range.
    """

    factor: int = 28
    min_pixels: int = 3136
    max_pixels: int = 12845056

    def __post_init__(self) -> None:
        """Check the settings."""
        if self.factor < 1:
            raise ValueError(f"`factor` is {self.factor}; give at least 1 (28 for Qwen2.5-VL)")
        if not self.factor**2 <= self.min_pixels <= self.max_pixels:
            raise ValueError(
                f"`min_pixels` is {self.min_pixels} and `max_pixels` {self.max_pixels}; give areas of at least one "
                f"patch of {self.factor} by {self.factor}, the smaller one first"
            )

    def frame(self, size: tuple[int, int]) -> Frame:
        """Return the picture at the processor's size."""
        if max(size) > _LONGEST * min(size):
            raise CannotWrite(
                f"the picture is {size[0]} by {size[1]} pixels, and the processor takes none that is over {_LONGEST} "
                "times longer than wide; leave it out"
            )
        return Frame((0, 0, size[0], size[1]), smart_size(size, self.factor, self.min_pixels, self.max_pixels))
