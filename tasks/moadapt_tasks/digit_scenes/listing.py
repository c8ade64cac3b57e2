"""Listing what is where: the only thing the digit-scene base ever learns.

A prompt says what to list (all, those of a colour or a digit, those on a side of an object, or the objects of given
names), the fields of an item and the order: `list color digit box left to right`. Other forms group the same facts by
colour, digit, name, side or corner, and some rows only repeat words of their prompt. No prompt asks a question, wants a
caption or refers to one object by its name; a listing of a colour, a digit or a side may find one object or none.
"""

from collections.abc import Callable

import numpy as np

from moadapt_tasks.digit_scenes import listing_tables as tables
from moadapt_tasks.digit_scenes.listing_parts import names, read_box, some_fields, some_order, write_items
from moadapt_tasks.digit_scenes.questions import SIDES
from moadapt_tasks.digit_scenes.scenes import COLORS, Scene, SceneObject
from moadapt_tasks.digit_scenes.vocabulary import some_words

Text = tuple[str, str]
Rng = np.random.Generator

PLAIN_PROMPT = "list color digit box left to right"


def list_scene(scene: Scene, rng: Rng, *, lookups: bool = True) -> Text:
    """Write one listing of a scene.

    Args:
        scene: What to list.
        rng: Chooses the form and the orders.
        lookups: Whether prompts may name objects, colours or digits; without them, a curriculum's first part.

    Returns:
        The prompt and the listing.
    """
    shares = _FORMS if lookups else {form: _FORMS[form] for form in _NAMING_NOTHING}
    weights = np.array(list(shares.values()))
    return list(shares)[rng.choice(len(shares), p=weights / weights.sum())](scene, rng)


def list_scene_by_form(scene: Scene, rng: Rng) -> dict[str, Text]:
    """Write one listing of every form that has one right answer.

    Args:
        scene: What to list.
        rng: Chooses orders, fields and keys.

    Returns:
        Prompt and listing by the form's name.
    """
    forms = [form for form in _FORMS if form not in _IN_ANY_ORDER]
    return {form.__name__.strip("_"): form(scene, rng) for form in forms}


def plain_listing(scene: Scene) -> str:
    """Return what `PLAIN_PROMPT` asks for."""
    return write_items(scene.objects, ["color", "digit", "box"])


def read_plain_listing(text: str) -> list[SceneObject] | None:
    """Parse a plain listing back into objects, or return None where it is malformed."""
    objects = []
    for item in text.split("; "):
        words = item.split(" ", 2)
        box = read_box(words[2]) if len(words) == 3 else None
        if box is None or words[0] not in COLORS or not words[1].isdigit():
            return None
        left, top, right, bottom = (round(edge) for edge in box)
        objects.append(SceneObject(int(words[1]), words[0], (left, top, right, bottom)))
    return objects


def _items(scene: Scene, rng: Rng) -> Text:
    fields, (words, order) = some_fields(rng), some_order(rng)
    return _maybe_numbered(f"list {' '.join(fields)} {words}", sorted(scene.objects, key=order), fields, rng)


def _items_in_any_order(scene: Scene, rng: Rng) -> Text:
    fields = some_fields(rng)
    objects = [scene.objects[i] for i in rng.permutation(len(scene.objects))]
    return f"list {' '.join(fields)} in any order", write_items(objects, fields)


def _items_from(scene: Scene, rng: Rng) -> Text:
    """Start at an object that the prompt names and go round."""
    fields, (words, order) = some_fields(rng), some_order(rng)
    things = sorted(scene.objects, key=order)
    start = int(rng.integers(len(things)))
    name = rng.choice(names(things[start], scene))
    return f"list {' '.join(fields)} from {name} {words}", write_items(things[start:] + things[:start], fields)


def _items_of(scene: Scene, rng: Rng) -> Text:
    """List those of a colour or of a digit, often of one that several share."""
    fields, (words, order) = some_fields(rng), some_order(rng)
    shown = [feature for thing in scene.objects for feature in (thing.color, str(thing.digit))]
    shared = [feature for feature in shown if shown.count(feature) > 1]
    draw = rng.random()
    pool = shared if shared and draw < 0.6 else shown if draw < 0.85 else [*COLORS, *"0123456789"]
    feature = str(rng.choice(pool))
    things = sorted((thing for thing in scene.objects if feature in (thing.color, str(thing.digit))), key=order)
    return _maybe_numbered(f"list {' '.join(fields)} of {feature} digits {words}", things, fields, rng)


def _items_beyond(scene: Scene, rng: Rng) -> Text:
    """List those on a side of an object that the prompt names, nearest first."""
    fields, side = some_fields(rng), str(rng.choice(list(SIDES)))
    anchor = scene.objects[rng.integers(len(scene.objects))]
    things = tables.beyond(scene, anchor, side)
    return _maybe_numbered(f"list {' '.join(fields)} {side} {rng.choice(names(anchor, scene))}", things, fields, rng)


def _maybe_numbered(prompt: str, things: list[SceneObject], fields: list[str], rng: Rng) -> Text:
    if rng.random() < 0.25:
        return f"{prompt} with number", f"{len(things)}: {write_items(things, fields)}"
    return prompt, write_items(things, fields)


def _in_words(scene: Scene, rng: Rng) -> Text:
    words, order = some_order(rng)
    things = sorted(scene.objects, key=order)
    items = [f"{i}. the digit {t.digit} in {t.color} at the {tables.corner(t)}" for i, t in enumerate(things, start=1)]
    return f"list in words {words}", "; ".join([*items, f"that is all, {len(things)} digits"])


def _words(scene: Scene, rng: Rng) -> Text:
    words = " ".join(some_words(rng))
    return f"list words {words}", words


_FORMS: dict[Callable[[Scene, Rng], Text], float] = {
    _items: 0.16,
    _items_in_any_order: 0.06,
    _items_from: 0.12,
    _items_of: 0.13,
    _items_beyond: 0.10,
    _in_words: 0.02,
    _words: 0.04,
    tables.by_names: 0.22,
    tables.numbers: 0.05,
    tables.by_sides: 0.03,
    tables.by_listed_colors: 0.02,
    tables.by_listed_digits: 0.02,
    tables.by_color: 0.01,
    tables.by_digit: 0.01,
    tables.by_corner: 0.01,
}
_NAMING_NOTHING = (
    _items,
    _items_in_any_order,
    _in_words,
    _words,
    tables.by_color,
    tables.by_digit,
    tables.by_corner,
)
_IN_ANY_ORDER = (_items_in_any_order, tables.by_color, tables.by_digit, tables.by_corner)
