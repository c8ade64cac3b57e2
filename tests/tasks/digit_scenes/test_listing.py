import re
from collections import Counter

import numpy as np
import pytest

from moadapt_tasks.digit_scenes import listing
from moadapt_tasks.digit_scenes.captions import captions
from moadapt_tasks.digit_scenes.expressions import expressions
from moadapt_tasks.digit_scenes.listing_parts import FIELDS, ORDERS, absent_names, names
from moadapt_tasks.digit_scenes.listing_tables import beyond, by_color
from moadapt_tasks.digit_scenes.questions import ask
from moadapt_tasks.digit_scenes.scenes import COLORS, SIZE, Scene, SceneObject, draw_scene

SCENE = Scene(
    np.zeros((SIZE, SIZE, 3), dtype=np.uint8),
    (
        SceneObject(3, "red", (2, 30, 12, 44)),
        SceneObject(5, "red", (20, 4, 30, 20)),
        SceneObject(7, "blue", (40, 20, 52, 36)),
    ),
)


@pytest.fixture(scope="module")
def drawn() -> list[tuple[Scene, dict[str, listing.Text]]]:
    scenes = [draw_scene("train", index, 5) for index in range(200)]
    return [(scene, listing.list_scene_by_form(scene, np.random.default_rng(i))) for i, scene in enumerate(scenes)]


def texts(drawn: list[tuple[Scene, dict[str, listing.Text]]], form: str) -> list[tuple[Scene, str, str]]:
    return [(scene, *forms[form]) for scene, forms in drawn]


def test_a_plain_listing_is_read_back() -> None:
    objects = listing.read_plain_listing(listing.plain_listing(SCENE))
    assert objects == list(SCENE.objects)


def test_every_form_is_drawn_and_prompts_begin_with_list() -> None:
    rng = np.random.default_rng(0)
    prompts = [listing.list_scene(SCENE, rng)[0] for _ in range(600)]
    assert all(prompt.startswith("list ") for prompt in prompts)
    kinds = Counter(re.sub(r"color|digit|box", "", prompt).split()[1] for prompt in prompts)
    assert {"from", "of", "for", "number", "by", "in", "words", "around", "left"} <= set(kinds)


def test_no_prompt_is_one_of_a_task(drawn: list[tuple[Scene, dict[str, listing.Text]]]) -> None:
    for scene, forms in drawn:
        rng = np.random.default_rng(0)
        answers = {question.text for question in ask(scene, 9, rng)} | {e.text for e in expressions(scene)}
        for prompt, answer in forms.values():
            assert "?" not in prompt or prompt.startswith("list words")
            assert prompt not in answers
            assert answer not in captions(scene)


def test_items_come_in_the_order_that_was_asked(drawn: list[tuple[Scene, dict[str, listing.Text]]]) -> None:
    words = {"leftmost first": "left to right", "rightmost first": "right to left", "topmost first": "top to bottom"}
    words |= {
        "bottommost first": "bottom to top",
        "smallest first": "small to large",
        "largest first": "large to small",
    }
    for scene, prompt, answer in texts(drawn, "items"):
        asked = prompt.removeprefix("list ").removesuffix(" with number").split()
        fields = [word for word in asked if word in FIELDS]
        order = " ".join(asked[len(fields) :])
        things = sorted(scene.objects, key=ORDERS[words.get(order, order)])
        items = "; ".join(" ".join(FIELDS[field](thing) for field in fields) for thing in things)
        assert answer == (f"{len(things)}: {items}" if prompt.endswith("number") else items)


def test_items_of_a_colour_or_digit_are_those_that_have_it(drawn: list[tuple[Scene, dict[str, listing.Text]]]) -> None:
    empty = 0
    for scene, prompt, answer in texts(drawn, "items_of"):
        feature = prompt.split(" of ")[1].split()[0]
        count = sum(feature in (thing.color, str(thing.digit)) for thing in scene.objects)
        items = answer.partition(": ")[2] if prompt.endswith("number") else answer
        assert (items == "none") == (count == 0)
        assert count == 0 or len(items.split("; ")) == count
        empty += count == 0
    assert 0 < empty < len(drawn) / 4


def test_beyond_lists_one_side_nearest_first() -> None:
    three, five, seven = SCENE.objects
    assert beyond(SCENE, three, "right of") == [five, seven]
    assert beyond(SCENE, seven, "left of") == [five, three]
    assert beyond(SCENE, three, "above") == [seven, five]
    assert beyond(SCENE, five, "above") == []


def test_names_point_to_one_object(drawn: list[tuple[Scene, dict[str, listing.Text]]]) -> None:
    assert names(SCENE.objects[0], SCENE) == ["red 3", "the red 3", "3", "the 3"]
    assert names(SCENE.objects[2], SCENE)[2:4] == ["blue", "the blue digit"]
    for scene, _ in drawn:
        every = [name for thing in scene.objects for name in names(thing, scene)]
        assert len(set(every)) == len(every)
        assert not set(every) & set(absent_names(scene))


def test_answers_for_names_follow_the_prompt(drawn: list[tuple[Scene, dict[str, listing.Text]]]) -> None:
    for scene, prompt, answer in texts(drawn, "by_names"):
        fields, _, asked = prompt.removeprefix("list ").removesuffix(" with names").partition(" for ")
        known = {name: thing for thing in scene.objects for name in names(thing, scene)}
        keys = asked.split(", ")
        assert 2 <= len(keys) <= 4
        for key, found in zip(keys, answer.split("; "), strict=True):
            value = " ".join(FIELDS[field](known[key]) for field in fields.split()) if key in known else "none"
            assert found == (f"{key}: {value}" if prompt.endswith("names") else value)


def test_numbers_count_what_each_key_has(drawn: list[tuple[Scene, dict[str, listing.Text]]]) -> None:
    counts: Counter[str] = Counter()
    for scene, prompt, answer in texts(drawn, "numbers"):
        for key, count in zip(prompt.partition(" of ")[2].split(", "), answer.split("; "), strict=True):
            features = [{thing.color, str(thing.digit), thing.name} for thing in scene.objects]
            assert int(count) == sum(key in each for each in features)
            counts[count] += 1
    assert {"0", "1", "2"} <= set(counts)


def test_tables_have_a_row_a_key(drawn: list[tuple[Scene, dict[str, listing.Text]]]) -> None:
    for scene, forms in drawn:
        rows = dict(row.split(": ") for row in by_color(scene, np.random.default_rng(0))[1].split("; "))
        assert rows.keys() == COLORS.keys()
        assert sum(value != "none" for value in rows.values()) == len({thing.color for thing in scene.objects})
        sides = forms["by_sides"][1].split("; ")
        assert [side.split(": ")[0] for side in sides] == re.findall(
            r"left of|right of|above|below", forms["by_sides"][0]
        )
