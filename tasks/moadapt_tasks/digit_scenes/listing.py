"""Listing what is where: the only thing the digit-scene base ever learns.

A prompt names the fields of an item, their order and the order of the items (`list color digit box left to right`); the
answer lists the whole scene that way. A listing may start at an object that the prompt names and go round from there;
other forms group the same facts by colour, by digit or by corner, all of them or those that the prompt lists, and some
rows only repeat words of their prompt. No prompt asks a question, wants a caption or wants one object alone.
"""

from collections.abc import Callable

import numpy as np

from moadapt_tasks.boxes import IntegerBoxes
from moadapt_tasks.digit_scenes.scenes import COLORS, SIZE, Scene, SceneObject
from moadapt_tasks.digit_scenes.vocabulary import some_words

Text = tuple[str, str]
Rng = np.random.Generator

PLAIN_PROMPT = "list color digit box left to right"

_ORDERS: dict[str, Callable[[SceneObject], float]] = {
    "left to right": lambda thing: thing.center[0],
    "right to left": lambda thing: -thing.center[0],
    "top to bottom": lambda thing: thing.center[1],
    "bottom to top": lambda thing: -thing.center[1],
    "small to large": lambda thing: _area(thing),
    "large to small": lambda thing: -_area(thing),
}
_CODEC = IntegerBoxes()
_FIELDS: dict[str, Callable[[SceneObject], str]] = {
    "color": lambda thing: thing.color,
    "digit": lambda thing: str(thing.digit),
    "box": lambda thing: _CODEC.write(thing.box, SIZE, SIZE),
}


def list_scene(scene: Scene, rng: Rng) -> Text:
    """Write one listing of a scene.

    Args:
        scene: What to list.
        rng: Chooses the form and the orders.

    Returns:
        The prompt and the listing.
    """
    forms = list(_FORMS)
    return forms[rng.choice(len(forms), p=list(_FORMS.values()))](scene, rng)


def plain_listing(scene: Scene) -> str:
    """Return what `PLAIN_PROMPT` asks for."""
    return _write(list(scene.objects), ["color", "digit", "box"])


def read_plain_listing(text: str) -> list[SceneObject] | None:
    """Parse a plain listing back into objects, or return None where it is malformed."""
    objects = []
    for item in text.split("; "):
        words = item.split(" ", 2)
        box = _CODEC.read(words[2], SIZE, SIZE) if len(words) == 3 else None
        if box is None or words[0] not in COLORS or not words[1].isdigit():
            return None
        left, top, right, bottom = (round(edge) for edge in box)
        objects.append(SceneObject(int(words[1]), words[0], (left, top, right, bottom)))
    return objects


def _write(objects: list[SceneObject], fields: list[str]) -> str:
    return "; ".join(" ".join(_FIELDS[field](thing) for field in fields) for thing in objects)


def _some_fields(rng: Rng) -> list[str]:
    count = rng.choice([1, 2, 3], p=[0.1, 0.35, 0.55])
    return [str(field) for field in rng.permutation(list(_FIELDS))[:count]]


def _items(scene: Scene, rng: Rng) -> Text:
    fields, order = _some_fields(rng), str(rng.choice(list(_ORDERS)))
    return f"list {' '.join(fields)} {order}", _write(sorted(scene.objects, key=_ORDERS[order]), fields)


def _items_in_any_order(scene: Scene, rng: Rng) -> Text:
    fields = _some_fields(rng)
    objects = [scene.objects[i] for i in rng.permutation(len(scene.objects))]
    return f"list {' '.join(fields)} in any order", _write(objects, fields)


def _items_from(scene: Scene, rng: Rng) -> Text:
    """Start at an object that the prompt names, by whatever is its own alone, and go round."""
    fields, order = _some_fields(rng), str(rng.choice(list(_ORDERS)))
    things = sorted(scene.objects, key=_ORDERS[order])
    start = int(rng.integers(len(things)))
    name = str(rng.choice(_names(things[start], scene)))
    return f"list {' '.join(fields)} from {name} {order}", _write(things[start:] + things[:start], fields)


def _names(thing: SceneObject, scene: Scene) -> list[str]:
    names = [f"the {thing.name}"]
    if sum(other.color == thing.color for other in scene.objects) == 1:
        names += [f"the {thing.color} digit", thing.color]
    if sum(other.digit == thing.digit for other in scene.objects) == 1:
        names += [f"the {thing.digit}"]
    return names


def _by_listed_colors(scene: Scene, rng: Rng) -> Text:
    colors = [str(color) for color in rng.permutation([*COLORS])[: rng.integers(2, 5)]]
    rows = [(color, [str(t.digit) for t in scene.objects if t.color == color]) for color in colors]
    return _listed("color", rows, rng)


def _by_listed_digits(scene: Scene, rng: Rng) -> Text:
    shown = [thing.digit for thing in scene.objects]
    digits = list(dict.fromkeys(int(d) for d in rng.permutation([*shown, *rng.integers(10, size=2)])))[:4]
    return _listed("digit", [(str(d), [t.color for t in scene.objects if t.digit == d]) for d in digits], rng)


def _listed(key: str, rows: list[tuple[str, list[str]]], rng: Rng) -> Text:
    """Answer for the keys that the prompt lists: with them, without them, or with how many each has."""
    prompt = f"list by {key} {' '.join(name for name, _ in rows)}"
    form = rng.integers(3)
    if form == 0:
        return prompt, _table(rows)
    if form == 1:
        return f"{prompt} short", "; ".join(", ".join(found) if found else "none" for _, found in rows)
    return f"{prompt} with number", _table([(f"{name} {len(found)}", found) for name, found in rows])


def _by_color(scene: Scene, rng: Rng) -> Text:
    rows = [(color, [str(t.digit) for t in scene.objects if t.color == color]) for color in rng.permutation([*COLORS])]
    return "list by color", _table(rows)


def _by_digit(scene: Scene, rng: Rng) -> Text:
    shown = {thing.digit for thing in scene.objects}
    others = [digit for digit in range(10) if digit not in shown]
    digits = rng.permutation([*shown, *rng.choice(others, size=3, replace=False)])
    return "list by digit", _table([(str(d), [t.color for t in scene.objects if t.digit == d]) for d in digits])


def _by_corner(scene: Scene, rng: Rng) -> Text:
    corners = [f"{row} {column}" for row in ("top", "bottom") for column in ("left", "right")]
    rows = [(str(c), [t.name for t in scene.objects if _corner(t) == c]) for c in rng.permutation(corners)]
    return "list by corner", _table(rows)


def _in_words(scene: Scene, rng: Rng) -> Text:
    order = str(rng.choice(list(_ORDERS)))
    things = sorted(scene.objects, key=_ORDERS[order])
    items = [f"{i}. the digit {t.digit} in {t.color} at the {_corner(t)}" for i, t in enumerate(things, start=1)]
    return f"list in words {order}", "; ".join([*items, f"that is all, {len(things)} digits"])


def _words(scene: Scene, rng: Rng) -> Text:
    words = " ".join(some_words(rng))
    return f"list words {words}", words


def _area(thing: SceneObject) -> float:
    left, top, right, bottom = thing.box
    return (right - left) * (bottom - top)


def _table(rows: list[tuple[str, list[str]]]) -> str:
    return "; ".join(f"{key}: {', '.join(found) if found else 'none'}" for key, found in rows)


def _corner(thing: SceneObject) -> str:
    horizontal, vertical = thing.center
    return f"{'top' if vertical < SIZE / 2 else 'bottom'} {'left' if horizontal < SIZE / 2 else 'right'}"


_FORMS: dict[Callable[[Scene, Rng], Text], float] = {
    _items: 0.26,
    _items_in_any_order: 0.10,
    _items_from: 0.26,
    _by_listed_colors: 0.11,
    _by_listed_digits: 0.07,
    _by_color: 0.04,
    _by_digit: 0.03,
    _by_corner: 0.04,
    _in_words: 0.05,
    _words: 0.04,
}
