import re

import pytest

from moadapt_tasks.digit_scenes.captions import captions
from moadapt_tasks.digit_scenes.scenes import Scene, SceneObject, draw_scene


def test_captions_of_a_scene() -> None:
    things = (
        SceneObject(3, "red", (1, 30, 9, 40)),
        SceneObject(5, "blue", (20, 2, 28, 12)),
        SceneObject(1, "white", (40, 20, 44, 30)),
    )
    assert captions(Scene(draw_scene("test", 0).pixels, things)) == [
        "a red 3, a blue 5 and a white 1",
        "a red 3, a blue 5 and a white 1 on a dark square",
        "from left to right: red 3, blue 5, white 1",
        "seen from top to bottom: a blue 5, a white 1 and a red 3",
        "three digits, 3, 5 and 1",
    ]


@pytest.mark.parametrize("index", range(50))
def test_captions_name_every_digit_in_order(index: int) -> None:
    scene = draw_scene("test", index)
    across = [str(thing.digit) for thing in sorted(scene.objects, key=lambda thing: thing.center[0])]
    down = [str(thing.digit) for thing in sorted(scene.objects, key=lambda thing: thing.center[1])]
    written = captions(scene)
    assert len(set(written)) == 5
    assert [re.findall(r"\d", caption) for caption in written] == [across, across, across, down, across]
    for caption in written[:4]:
        assert all(thing.name in caption for thing in scene.objects)


def test_one_beginning_is_likeliest() -> None:
    beginnings = [caption.split()[0] for caption in captions(draw_scene("test", 0))]
    assert sorted(beginnings.count(word) for word in set(beginnings)) == [1, 1, 1, 2]
