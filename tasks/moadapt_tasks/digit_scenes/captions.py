"""Five descriptions of a digit scene, alike in facts and different in words, order and detail."""

from collections.abc import Sequence

from moadapt_tasks.digit_scenes.questions import NUMBERS
from moadapt_tasks.digit_scenes.scenes import Scene


def captions(scene: Scene) -> list[str]:
    """Describe a scene five times: three from left to right, one from top to bottom, one without colours."""
    names = [thing.name for thing in scene.objects]
    down = [thing.name for thing in sorted(scene.objects, key=lambda thing: thing.center[1])]
    number = NUMBERS[len(names)]
    return [
        _listed([f"a {name}" for name in names]),
        f"from left to right: {', '.join(names)}",
        f"{number} digits: {_listed(names)}",
        f"from top to bottom there are {_listed([f'a {name}' for name in down])}",
        f"a picture of the {number} digits {_listed([str(thing.digit) for thing in scene.objects])}",
    ]


def _listed(names: Sequence[str]) -> str:
    """Join two or more names as a sentence does."""
    return f"{', '.join(names[:-1])} and {names[-1]}"
