"""What listings are made of: the fields of an item, the orders of items, and the names that point to objects."""

from collections.abc import Callable, Iterable, Sequence

import numpy as np

from moadapt_tasks.boxes import Box, IntegerBoxes
from moadapt_tasks.digit_scenes.scenes import COLORS, SIZE, Scene, SceneObject

Rng = np.random.Generator
Order = Callable[[SceneObject], float]

_CODEC = IntegerBoxes()
FIELDS: dict[str, Callable[[SceneObject], str]] = {
    "color": lambda thing: thing.color,
    "digit": lambda thing: str(thing.digit),
    "box": lambda thing: _CODEC.write([thing.box], (SIZE, SIZE), ""),
}
ORDERS: dict[str, Order] = {
    "left to right": lambda thing: thing.center[0],
    "right to left": lambda thing: -thing.center[0],
    "top to bottom": lambda thing: thing.center[1],
    "bottom to top": lambda thing: -thing.center[1],
    "small to large": lambda thing: _area(thing),
    "large to small": lambda thing: -_area(thing),
}
_OTHER_WORDS = {
    "left to right": "leftmost first",
    "right to left": "rightmost first",
    "top to bottom": "topmost first",
    "bottom to top": "bottommost first",
    "small to large": "smallest first",
    "large to small": "largest first",
}


def some_fields(rng: Rng) -> list[str]:
    """Draw one to three fields in any order; a single one is the box as often as not."""
    count = rng.choice([1, 2, 3], p=[0.25, 0.35, 0.4])
    weights = [0.25, 0.25, 0.5] if count == 1 else None
    return [str(field) for field in rng.choice(list(FIELDS), size=count, replace=False, p=weights)]


def some_order(rng: Rng) -> tuple[str, Order]:
    """Draw an order: its words and its key."""
    order = str(rng.choice(list(ORDERS)))
    return str(rng.choice([order, _OTHER_WORDS[order]])), ORDERS[order]


def names(thing: SceneObject, scene: Scene) -> list[str]:
    """Return what points to an object and to no other by colour and digit."""
    found = [thing.name, f"the {thing.name}"]
    if sum(other.color == thing.color for other in scene.objects) == 1:
        found += [thing.color, f"the {thing.color} digit"]
    if sum(other.digit == thing.digit for other in scene.objects) == 1:
        found += [str(thing.digit), f"the {thing.digit}"]
    return found


def absent_names(scene: Scene) -> list[str]:
    """Return names of nothing in a scene; those of a colour and a digit share one of the two with an object."""
    colors, digits = {thing.color for thing in scene.objects}, {thing.digit for thing in scene.objects}
    shown = {thing.name for thing in scene.objects}
    pairs = [(color, digit) for color in COLORS for digit in range(10) if color in colors or digit in digits]
    near = [f"{color} {digit}" for color, digit in pairs if f"{color} {digit}" not in shown]
    return [
        *near,
        *(color for color in COLORS if color not in colors),
        *(str(digit) for digit in range(10) if digit not in digits),
    ]


def write_items(objects: Iterable[SceneObject], fields: Sequence[str]) -> str:
    """Write objects one after the other, or `none`."""
    return "; ".join(" ".join(FIELDS[field](thing) for field in fields) for thing in objects) or "none"


def read_box(text: str) -> Box | None:
    """Return the first box of a text in pixels, or None."""
    return next(iter(_CODEC.read(text, (SIZE, SIZE)) or ()), None)


def write_table(rows: Iterable[tuple[str, Sequence[str]]]) -> str:
    """Write what was found under each key, or `none` there."""
    return "; ".join(f"{key}: {', '.join(found) if found else 'none'}" for key, found in rows)


def _area(thing: SceneObject) -> float:
    left, top, right, bottom = thing.box
    return (right - left) * (bottom - top)
