import re
from collections import Counter

import numpy as np
import pytest

from moadapt_tasks.digit_scenes.expressions import expressions, refer
from moadapt_tasks.digit_scenes.scenes import COLORS, Scene, SceneObject, draw_scene

SCENES = 400
AXES = {"left": 0, "right": 0, "top": 1, "bottom": 1, "above": 1, "below": 1}


def candidates(scene: Scene, text: str) -> list[SceneObject]:
    """Return everything that a text may refer to, for any sensible reading of its words."""
    words = text.removeprefix("the ").split()
    things = list(scene.objects)
    if found := re.fullmatch(r"the digit (left of|right of|above|below) the (\w+) (\d)", text):
        anchor = next(thing for thing in things if (thing.color, str(thing.digit)) == (found[2], found[3]))
        return [thing for thing in things if on_side(thing, anchor, found[1])]
    if words[0] in ("largest", "smallest"):
        return extremes(things, words[0])
    colored = [word for word in words if word in COLORS]
    things = [thing for thing in things if not colored or thing.color in colored]
    if words[0].endswith("most"):
        return outermost(things, words[0].removesuffix("most"))
    return [thing for thing in things if words[-1] in ("digit", str(thing.digit))]


def on_side(thing: SceneObject, anchor: SceneObject, side: str) -> bool:
    left, top = (thing.center[axis] < anchor.center[axis] for axis in (0, 1))
    return {"left of": left, "right of": not left, "above": top, "below": not top}[side] and thing != anchor


def outermost(things: list[SceneObject], end: str) -> list[SceneObject]:
    """Those furthest out by centre or by edge."""
    axis, first = AXES[end], end in ("left", "top")
    by_centre = sorted(things, key=lambda thing: thing.center[axis])
    by_edge = sorted(things, key=lambda thing: thing.box[axis if first else axis + 2])
    return [by_centre[0], by_edge[0]] if first else [by_centre[-1], by_edge[-1]]


def extremes(things: list[SceneObject], word: str) -> list[SceneObject]:
    """Those whose area comes within a tenth of the largest, or of the smallest."""
    areas = [(t.box[2] - t.box[0]) * (t.box[3] - t.box[1]) for t in things]
    if word == "largest":
        return [t for t, area in zip(things, areas, strict=True) if area * 1.1 >= max(areas)]
    return [t for t, area in zip(things, areas, strict=True) if area <= 1.1 * min(areas)]


@pytest.mark.parametrize("split", ["train", "test"])
def test_expressions_refer_to_one_thing_only(split: str) -> None:
    kinds: Counter[str] = Counter()
    for index in range(SCENES):
        scene = draw_scene(split, index, 5)
        for expression in expressions(scene):
            kinds[expression.kind] += 1
            centre_or_edge = candidates(scene, expression.text)
            assert expression.target in centre_or_edge, (expression, scene.objects)
            if expression.kind != "end":
                assert centre_or_edge == [expression.target], (expression, scene.objects)
    assert set(kinds) == {"name", "color", "digit", "end", "side", "size"}


def test_expressions_by_end_agree_in_centre_and_edge() -> None:
    for index in range(SCENES):
        scene = draw_scene("test", index, 6)
        for expression in (one for one in expressions(scene) if one.kind == "end"):
            _, end, *color, _ = expression.text.split()
            axis, first = AXES[end.removesuffix("most")], end in ("leftmost", "topmost")
            for other in scene.objects:
                if other == expression.target or (color and other.color != color[0]):
                    continue
                ahead = [
                    other.center[axis] - expression.target.center[axis],
                    other.box[axis if first else axis + 2] - expression.target.box[axis if first else axis + 2],
                ]
                assert (min(ahead) if first else -max(ahead)) >= 0
                assert ahead[0] != 0


def test_expressions_leave_out_what_is_not_clear() -> None:
    twins = (
        SceneObject(3, "red", (1, 10, 11, 30)),
        SceneObject(3, "blue", (20, 5, 30, 24)),
        SceneObject(4, "blue", (40, 16, 50, 36)),
    )
    texts = {expression.text for expression in expressions(Scene(draw_scene("test", 0).pixels, twins))}
    assert "the red digit" in texts
    assert "the 4" in texts
    assert "the leftmost blue digit" in texts
    assert "the digit left of the blue 3" in texts
    assert not texts & {"the 3", "the blue digit", "the largest digit", "the smallest digit", "the leftmost red digit"}
    assert "the digit right of the red 3" not in texts  # there are two


def test_refer_varies_the_kinds() -> None:
    for index in range(50):
        scene = draw_scene("test", index)
        found = refer(scene, 3, np.random.default_rng(index))
        assert len({expression.kind for expression in found}) == len(found) == 3
        assert found == refer(scene, 3, np.random.default_rng(index))


def test_refer_stops_where_a_scene_bears_no_more() -> None:
    scene = draw_scene("test", 0)
    found = refer(scene, 1000, np.random.default_rng(0))
    assert {expression.text for expression in found} == {expression.text for expression in expressions(scene)}


def test_expressions_leave_out_an_end_on_which_centre_and_edge_disagree() -> None:
    things = (SceneObject(8, "red", (2, 1, 30, 20)), SceneObject(1, "blue", (10, 30, 14, 50)))  # centres at 16 and 12
    texts = {expression.text for expression in expressions(Scene(draw_scene("test", 0).pixels, things))}
    assert {"the topmost digit", "the bottommost digit", "the rightmost digit"} <= texts
    assert "the leftmost digit" not in texts


def test_expressions_leave_out_a_size_on_which_area_and_height_disagree() -> None:
    things = (SceneObject(8, "red", (2, 1, 30, 20)), SceneObject(1, "blue", (40, 30, 44, 50)))
    texts = {expression.text for expression in expressions(Scene(draw_scene("test", 0).pixels, things))}
    assert not texts & {"the largest digit", "the smallest digit"}  # 532 pixels, 19 high, against 80, 20 high
