"""Listings that answer for keys: colours, digits, names, sides of an object, corners.

The prompt gives the keys, or all of a kind are meant; the answer goes through them in turn and says `none` where
nothing is found. Some answers leave the keys out, some give numbers.
"""

from collections.abc import Callable, Sequence

from moadapt_tasks.digit_scenes.listing_parts import (
    Rng,
    absent_names,
    names,
    some_fields,
    write_items,
    write_table,
)
from moadapt_tasks.digit_scenes.questions import SIDES
from moadapt_tasks.digit_scenes.scenes import COLORS, SIZE, Scene, SceneObject

Text = tuple[str, str]


def beyond(scene: Scene, anchor: SceneObject, side: str) -> list[SceneObject]:
    """Return the objects on a side of another, the nearest along that direction first."""
    axis, sign = SIDES[side]
    there = [thing for thing in scene.objects if sign * (thing.center[axis] - anchor.center[axis]) > 0]
    return sorted(there, key=lambda thing: sign * thing.center[axis])


def by_names(scene: Scene, rng: Rng) -> Text:
    """Answer for two to four names, of objects and of nothing."""
    rows = [(str(rng.choice(names(thing, scene))), [thing]) for thing in scene.objects]
    rows += [(str(name), []) for name in rng.choice(absent_names(scene), size=rng.integers(3))]
    rows = [rows[i] for i in rng.permutation(len(rows))][: rng.integers(2, 5)]
    fields = some_fields(rng)
    prompt = f"list {' '.join(fields)} for {', '.join(name for name, _ in rows)}"
    if rng.random() < 0.25:
        return f"{prompt} with names", write_table([(name, _items(found, fields)) for name, found in rows])
    return prompt, "; ".join(write_items(found, fields) for _, found in rows)


def numbers(scene: Scene, rng: Rng) -> Text:
    """Say how many there are of two to four colours, digits or names."""
    kinds: list[Callable[[SceneObject], str]] = [lambda t: t.color, lambda t: str(t.digit), lambda t: t.name]
    shown = [kind(thing) for kind in kinds for thing in scene.objects]
    keys = [*rng.choice(shown, size=2), *rng.choice(absent_names(scene), size=2)]
    keys = list(dict.fromkeys(str(key) for key in rng.permutation(keys)))[: rng.integers(2, 5)]
    counts = [sum(kind(thing) == key for kind in kinds for thing in scene.objects) for key in keys]
    return f"list number of {', '.join(keys)}", "; ".join(str(count) for count in counts)


def by_sides(scene: Scene, rng: Rng) -> Text:
    """Answer for sides of an object, what is there nearest first."""
    anchor = scene.objects[rng.integers(len(scene.objects))]
    sides, fields = [str(side) for side in rng.permutation(list(SIDES))[: rng.integers(2, 5)]], some_fields(rng)
    prompt = f"list {' '.join(fields)} around {rng.choice(names(anchor, scene))} {', '.join(sides)}"
    return prompt, write_table([(side, _items(beyond(scene, anchor, side), fields)) for side in sides])


def by_listed_colors(scene: Scene, rng: Rng) -> Text:
    """Answer for some colours with their digits."""
    colors = [str(color) for color in rng.permutation([*COLORS])[: rng.integers(2, 5)]]
    rows = [(color, [str(t.digit) for t in scene.objects if t.color == color]) for color in colors]
    return _listed("color", rows, rng)


def by_listed_digits(scene: Scene, rng: Rng) -> Text:
    """Answer for some digits with their colours."""
    shown = [thing.digit for thing in scene.objects]
    digits = list(dict.fromkeys(int(d) for d in rng.permutation([*shown, *rng.integers(10, size=2)])))[:4]
    return _listed("digit", [(str(d), [t.color for t in scene.objects if t.digit == d]) for d in digits], rng)


def by_color(scene: Scene, rng: Rng) -> Text:
    """Go through all colours."""
    rows = [(color, [str(t.digit) for t in scene.objects if t.color == color]) for color in rng.permutation([*COLORS])]
    return "list by color", write_table(rows)


def by_digit(scene: Scene, rng: Rng) -> Text:
    """Go through the digits that are there and three others."""
    shown = {thing.digit for thing in scene.objects}
    others = [digit for digit in range(10) if digit not in shown]
    digits = rng.permutation([*shown, *rng.choice(others, size=3, replace=False)])
    return "list by digit", write_table([(str(d), [t.color for t in scene.objects if t.digit == d]) for d in digits])


def by_corner(scene: Scene, rng: Rng) -> Text:
    """Go through the four quarters of the picture."""
    corners = [f"{row} {column}" for row in ("top", "bottom") for column in ("left", "right")]
    rows = [(str(c), [t.name for t in scene.objects if corner(t) == c]) for c in rng.permutation(corners)]
    return "list by corner", write_table(rows)


def corner(thing: SceneObject) -> str:
    """Return the quarter of the picture in which an object's centre lies."""
    horizontal, vertical = thing.center
    return f"{'top' if vertical < SIZE / 2 else 'bottom'} {'left' if horizontal < SIZE / 2 else 'right'}"


def _items(objects: Sequence[SceneObject], fields: Sequence[str]) -> list[str]:
    return [write_items([thing], fields) for thing in objects]


def _listed(key: str, rows: list[tuple[str, list[str]]], rng: Rng) -> Text:
    """Answer for the keys that the prompt lists: with them, without them, or with how many each has."""
    prompt = f"list by {key} {' '.join(name for name, _ in rows)}"
    form = rng.integers(3)
    if form == 0:
        return prompt, write_table(rows)
    if form == 1:
        return f"{prompt} short", "; ".join(", ".join(found) if found else "none" for _, found in rows)
    return f"{prompt} with number", write_table([(f"{name} {len(found)}", found) for name, found in rows])
