"""Referring expressions: what points to one digit of a scene and to no other."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from moadapt_tasks.digit_scenes.questions import SIDES
from moadapt_tasks.digit_scenes.scenes import Scene, SceneObject

Rng = np.random.Generator

_CLEARLY = 1.3
"""How many times larger in area than the next one the largest digit must be, to be called so."""
_ENDS: dict[str, tuple[int, int]] = {
    "leftmost": (0, -1),
    "topmost": (1, -1),
    "rightmost": (0, 1),
    "bottommost": (1, 1),
}


@dataclass(frozen=True)
class Expression:
    """One referring expression.

    Args:
        text: Such as `the red 3`.
        target: What it refers to.
        kind: What it goes by: `name`, `color`, `digit`, `end`, `side` or `size`.
    """

    text: str
    target: SceneObject
    kind: str


def refer(scene: Scene, count: int, rng: Rng) -> list[Expression]:
    """Refer to things in a scene, by different kinds of expression where it bears them.

    Args:
        scene: What to refer to.
        count: How many; fewer come back where the scene does not bear as many.
        rng: Chooses among the expressions.
    """
    found = expressions(scene)
    shuffled = [found[i] for i in rng.permutation(len(found))]
    uses: Counter[str] = Counter()
    earlier = []
    for expression in shuffled:
        earlier.append(uses[expression.kind])
        uses[expression.kind] += 1
    kinds_in_turn = sorted(range(len(shuffled)), key=earlier.__getitem__)
    return [shuffled[i] for i in kinds_in_turn[:count]]


def expressions(scene: Scene) -> list[Expression]:
    """Return every expression that is unambiguous in a scene."""
    kinds = (_by_name, _by_color, _by_digit, _by_end, _by_side, _by_size)
    return [expression for kind in kinds for expression in kind(scene.objects)]


def _by_name(things: Sequence[SceneObject]) -> Iterator[Expression]:
    for thing in things:
        yield Expression(f"the {thing.name}", thing, "name")


def _by_color(things: Sequence[SceneObject]) -> Iterator[Expression]:
    for thing in _alone(things, lambda thing: thing.color):
        yield Expression(f"the {thing.color} digit", thing, "color")


def _by_digit(things: Sequence[SceneObject]) -> Iterator[Expression]:
    for thing in _alone(things, lambda thing: thing.digit):
        yield Expression(f"the {thing.digit}", thing, "digit")


def _by_end(things: Sequence[SceneObject]) -> Iterator[Expression]:
    """Name the outermost of all and of those that share a colour, where centre and edge agree on it."""
    groups = {"digit": list(things)} | {
        f"{color} digit": [thing for thing in things if thing.color == color]
        for color, uses in Counter(thing.color for thing in things).items()
        if 1 < uses < len(things)
    }
    for group, members in groups.items():
        for end, (axis, sign) in _ENDS.items():
            thing = max(members, key=lambda member: sign * member.center[axis])
            if _reach(thing, axis, sign) == max(_reach(member, axis, sign) for member in members):
                yield Expression(f"the {end} {group}", thing, "end")


def _by_side(things: Sequence[SceneObject]) -> Iterator[Expression]:
    """Name the only one on a side of another, its centre beyond the other's edge."""
    for anchor in things:
        for side, (axis, sign) in SIDES.items():
            beyond = [thing for thing in things if sign * (thing.center[axis] - anchor.center[axis]) > 0]
            if len(beyond) == 1 and sign * beyond[0].center[axis] > _reach(anchor, axis, sign):
                yield Expression(f"the digit {side} the {anchor.name}", beyond[0], "side")


def _by_size(things: Sequence[SceneObject]) -> Iterator[Expression]:
    """Name the largest and the smallest, where area says so clearly and height agrees."""
    for word, sign in (("smallest", -1), ("largest", 1)):
        first, second = sorted(things, key=lambda thing: sign * _area(thing), reverse=True)[:2]
        small, large = sorted((_area(first), _area(second)))
        extreme = max(sign * _height(thing) for thing in things)
        if large >= _CLEARLY * small and sign * _height(first) == extreme:
            yield Expression(f"the {word} digit", first, "size")


def _alone(things: Sequence[SceneObject], feature: Callable[[SceneObject], object]) -> list[SceneObject]:
    uses = Counter(feature(thing) for thing in things)
    return [thing for thing in things if uses[feature(thing)] == 1]


def _reach(thing: SceneObject, axis: int, sign: int) -> int:
    """Return how far its edge lies in a direction, larger being further."""
    return sign * thing.box[axis + 2 * (sign > 0)]


def _area(thing: SceneObject) -> int:
    return (thing.box[2] - thing.box[0]) * _height(thing)


def _height(thing: SceneObject) -> int:
    return thing.box[3] - thing.box[1]
