"""Random boxes in pictures of every shape, and boxes that are equal to rounding."""

import random
from collections.abc import Sequence

import pytest

from moadapt_tasks.boxes import Box

SIZES = [(640, 480), (480, 640), (56, 56), (1, 1), (333, 777), (28, 27), (4000, 20), (20, 4000), (1, 200), (5000, 4000)]
"""Width and height, up to two hundred times longer than wide."""


def some_boxes(within: Box, least: tuple[float, float], count: int, seed: int = 3) -> list[Box]:
    """Draw boxes within one, each at least so wide and high, a few of them flush with its edges."""
    source = random.Random(f"{seed} {within} {least}")

    def span(low: float, high: float, least: float) -> tuple[float, float]:
        length = source.choice([least, high - low, source.uniform(min(least, high - low), high - low)])
        start = source.choice([low, high - length, source.uniform(low, high - length)])
        return max(low, start), min(high, start + length)

    boxes = []
    for _ in range(count):
        (left, right), (top, bottom) = span(within[0], within[2], least[0]), span(within[1], within[3], least[1])
        boxes.append((left, top, right, bottom))
    return boxes


def near(boxes: Sequence[Box] | None) -> list[Box]:
    """Return what equals these boxes to rounding; there must be some."""
    assert boxes
    return [pytest.approx(box) for box in boxes]
