"""Five descriptions of a digit scene, alike in facts and different in words, order and detail.

Two of them begin alike and the others each in their own way, so that a model which learned all five has one likeliest
beginning: were there several, chance would choose the form that it writes greedily, and with it the scores.
"""

from collections.abc import Sequence

from moadapt_tasks.digit_scenes.questions import NUMBERS
from moadapt_tasks.digit_scenes.scenes import Scene


def captions(scene: Scene) -> list[str]:
    """Describe a scene five times: three from left to right, one from top to bottom, one without colours."""
    names = [thing.name for thing in scene.objects]
    down = [thing.name for thing in sorted(scene.objects, key=lambda thing: thing.center[1])]
    number = NUMBERS[len(names)]
    across = _listed([f"a {name}" for name in names])
    return [
        across,
        f"{across} on a dark square",
        f"from left to right: {', '.join(names)}",
        f"seen from top to bottom: {_listed([f'a {name}' for name in down])}",
        f"{number} digits, {_listed([str(thing.digit) for thing in scene.objects])}",
    ]


def _listed(names: Sequence[str]) -> str:
    """Join two or more names as a sentence does."""
    return f"{', '.join(names[:-1])} and {names[-1]}"
