"""Questions about a digit scene, each with one right answer.

A question is asked only of scenes that leave no doubt: "what color is the 3?" where there is one 3, "what is left of
the red 3?" where the nearest digit on that side is the same by distance and by order.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from moadapt_tasks.digit_scenes.scenes import COLORS, Scene, SceneObject

Rng = np.random.Generator

_TRIES = 8
_NOTHING = 0.4
"""Chance to ask for a side where nothing is; with all of them, \"nothing\" would be the answer too often."""
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
SIDES: dict[str, tuple[int, int]] = {"left of": (0, -1), "right of": (0, 1), "above": (1, -1), "below": (1, 1)}


@dataclass(frozen=True)
class Question:
    """One question.

    Args:
        text: The question.
        answer: The right answer.
        kind: Which of the five kinds it is.
    """

    text: str
    answer: str
    kind: str


def ask(scene: Scene, count: int, rng: Rng) -> list[Question]:
    """Ask questions about a scene, the kinds in turn.

    Args:
        scene: What to ask about.
        count: How many; fewer come back where the scene does not bear as many different ones.
        rng: Chooses among the questions.
    """
    kinds = [kind(scene, rng) for kind in (_digits, _colors, _counts, _existence, _neighbours)]
    pools = [kinds[i] for i in rng.permutation(len(kinds))]
    asked: dict[str, Question] = {}
    while pools and len(asked) < count:
        pool = pools.pop(0)
        question = next((question for question in pool if question.text not in asked), None)
        if question is not None:
            asked[question.text] = question
            pools.append(pool)
    return list(asked.values())


def _digits(scene: Scene, rng: Rng) -> Iterator[Question]:
    for color in _only(scene, lambda thing: thing.color, rng):
        digit = next(thing.digit for thing in scene.objects if thing.color == color)
        yield Question(f"what digit is {color}?", str(digit), "digit")


def _colors(scene: Scene, rng: Rng) -> Iterator[Question]:
    for digit in _only(scene, lambda thing: str(thing.digit), rng):
        color = next(thing.color for thing in scene.objects if str(thing.digit) == digit)
        yield Question(f"what color is the {digit}?", color, "color")


def _counts(scene: Scene, rng: Rng) -> Iterator[Question]:
    """Ask for all digits or for those of a colour that is shown or not, in equal parts."""
    for _ in range(_TRIES):
        form = rng.integers(3)
        color = _color(scene, form == 1, rng)
        if form == 0:
            yield Question("how many digits are there?", str(len(scene.objects)), "count")
        else:
            number = sum(thing.color == color for thing in scene.objects)
            yield Question(f"how many {color} digits are there?", str(number), "count")


def _existence(scene: Scene, rng: Rng) -> Iterator[Question]:
    """Ask whether something is there; half of the answers are yes."""
    for _ in range(_TRIES):
        there, named = rng.random(2) < 0.5
        what = _name(scene, bool(there), rng) if named else f"{_color(scene, bool(there), rng)} digit"
        yield Question(f"is there a {what}?", "yes" if there else "no", "existence")


def _neighbours(scene: Scene, rng: Rng) -> Iterator[Question]:
    pairs = [(thing, side) for thing in scene.objects for side in SIDES]
    for choice in rng.permutation(len(pairs)):
        thing, side = pairs[choice]
        axis, sign = SIDES[side]
        beyond = [other for other in scene.objects if sign * (other.center[axis] - thing.center[axis]) > 0]
        text = f"what is {side} the {thing.name}?"
        if not beyond:
            if rng.random() < _NOTHING:
                yield Question(text, "nothing", "neighbour")
            continue
        neighbour = min(beyond, key=lambda other: abs(other.center[axis] - thing.center[axis]))
        if neighbour == min(beyond, key=lambda other: math.dist(other.center, thing.center)):
            yield Question(text, neighbour.name, "neighbour")


def _only(scene: Scene, feature: Callable[[SceneObject], str], rng: Rng) -> list[str]:
    """Return the features that exactly one object has, shuffled."""
    found = [feature(thing) for thing in scene.objects]
    return [str(value) for value in rng.permutation([value for value in found if found.count(value) == 1])]


def _color(scene: Scene, shown: bool, rng: Rng) -> str:
    present = {thing.color for thing in scene.objects}
    return str(rng.choice([color for color in COLORS if (color in present) == shown]))


def _name(scene: Scene, shown: bool, rng: Rng) -> str:
    """Return a name such as `red 3`; one that is not shown shares its colour or its digit with one that is."""
    names = [thing.name for thing in scene.objects]
    if shown:
        return str(rng.choice(names))
    colors, digits = {thing.color for thing in scene.objects}, {thing.digit for thing in scene.objects}
    near = [f"{color} {digit}" for color in COLORS for digit in range(10) if (color in colors) != (digit in digits)]
    crossed = [f"{color} {digit}" for color in COLORS for digit in range(10) if color in colors and digit in digits]
    absent = [name for name in crossed if name not in names]
    return str(rng.choice(absent if absent and rng.random() < 0.5 else near))
