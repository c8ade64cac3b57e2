"""A digit scene: two to four coloured handwritten digits on a dark square, known exactly.

Scene `i` of a split is a pure function of (seed, split, i). Centres differ by a margin in both directions, so that
"left of" and "topmost" have one answer.
"""

import zlib
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moadapt_tasks.digit_scenes.handwriting import Handwriting, handwriting

SIZE = 56
COLORS = {
    "red": (225, 50, 45),
    "green": (60, 190, 70),
    "blue": (60, 95, 235),
    "yellow": (235, 215, 60),
    "purple": (170, 70, 200),
    "white": (235, 235, 235),
}
_MARGIN = 4.0
_GAP = 2

Box = tuple[int, int, int, int]


@dataclass(frozen=True)
class SceneObject:
    """One digit of a scene.

    Args:
        digit: 0 to 9.
        color: A name of `COLORS`.
        box: Left, top, right, bottom of its ink in pixels, the last two exclusive.
    """

    digit: int
    color: str
    box: Box

    @property
    def center(self) -> tuple[float, float]:
        """Middle of the box, in pixels."""
        return (self.box[0] + self.box[2]) / 2, (self.box[1] + self.box[3]) / 2

    @property
    def name(self) -> str:
        """What it is, such as `red 3`."""
        return f"{self.color} {self.digit}"


@dataclass(frozen=True)
class Scene:
    """A picture and all that is in it.

    Args:
        pixels: RGB, (56, 56, 3), uint8.
        objects: Its digits, from left to right.
    """

    pixels: NDArray[np.uint8]
    objects: tuple[SceneObject, ...]


def draw_scene(split: str, index: int, seed: int = 0) -> Scene:
    """Draw scene `index` of a split.

    Args:
        split: Whose handwriting to use: `train`, `validation` or `test`.
        index: Which scene, from 0.
        seed: Another seed is another data set.
    """
    rng = np.random.default_rng([seed, zlib.crc32(split.encode()), index])
    hands = handwriting(split)
    while True:
        scene = _try_scene(hands, rng)
        if scene is not None:
            return scene


def _try_scene(hands: Handwriting, rng: np.random.Generator) -> Scene | None:
    noise = rng.normal(rng.uniform(8, 45), 5, size=(SIZE, SIZE, 1))
    canvas = np.repeat(noise, 3, axis=2)
    objects: list[SceneObject] = []
    for _ in range(rng.integers(2, 5)):
        digit, color = int(rng.integers(10)), str(rng.choice(list(COLORS)))
        ink = hands.glyph(digit, int(rng.integers(16, 24)), rng)
        box = _free_box(ink.shape[0], ink.shape[1], objects, rng)
        if box is None or any((other.digit, other.color) == (digit, color) for other in objects):
            return None
        objects.append(SceneObject(digit, color, box))
        _paint(canvas, ink, color, box, rng)
    pixels = canvas.clip(0, 255).astype(np.uint8)
    return Scene(pixels, tuple(sorted(objects, key=lambda thing: thing.center)))


def _free_box(height: int, width: int, objects: list[SceneObject], rng: np.random.Generator) -> Box | None:
    for _ in range(20):
        left, top = int(rng.integers(1, SIZE - width)), int(rng.integers(1, SIZE - height))
        thing = SceneObject(0, "", (left, top, left + width, top + height))
        if not any(_too_close(thing, other) for other in objects):
            return thing.box
    return None


def _too_close(one: SceneObject, other: SceneObject) -> bool:
    apart = [abs(a - b) for a, b in zip(one.center, other.center, strict=True)]
    overlap = all(
        one.box[axis] - _GAP < other.box[axis + 2] and other.box[axis] - _GAP < one.box[axis + 2] for axis in (0, 1)
    )
    return overlap or min(apart) < _MARGIN


def _paint(
    canvas: NDArray[np.float64], ink: NDArray[np.float32], color: str, box: Box, rng: np.random.Generator
) -> None:
    paint = np.array(COLORS[color], dtype=np.float64) + rng.normal(0, 10, size=3)
    left, top, right, bottom = box
    cover = np.clip(ink * 1.3, 0, 1)[..., None].astype(np.float64)
    canvas[top:bottom, left:right] = canvas[top:bottom, left:right] * (1 - cover) + paint * cover
