"""Presets: a placement and a rank for each task of a vision-language model.

They follow a published recipe for 6 vision and 12 language layers, told in fractions of depth, so that they fit any
base: grounding needs the whole vision tower and the end of the language tower, captioning the end of the vision tower
and all of the language tower, question answering every second block of both. Alpha is twice the rank. These are
starting points: nothing in the recipe was measured here.
"""

from moadapt.adapters.lora import LoRA
from moadapt.placement import Placement

_PRESETS: dict[str, tuple[int, Placement]] = {
    "vqa": (24, Placement(towers=("vision", "language"), every=2)),
    "captioning": (16, Placement(depth={"vision": (2 / 3, 1.0), "language": (0.0, 1.0)})),
    "grounding": (32, Placement(depth={"vision": (0.0, 1.0), "language": (5 / 6, 1.0)})),
}
PRESETS = tuple(_PRESETS)


def preset(task: str, rank: int | None = None) -> LoRA:
    """Return the adapter that the recipe gives a task.

    Args:
        task: One of `PRESETS`.
        rank: In the place of the recipe's; alpha stays twice the rank.

    Raises:
        ValueError: There is no preset of that name; the names are listed.
    """
    if task not in _PRESETS:
        raise ValueError(f"no preset is called {task!r}; there are {', '.join(PRESETS)}")
    own, placement = _PRESETS[task]
    chosen = own if rank is None else rank
    return LoRA(rank=chosen, alpha=2.0 * chosen, placement=placement)
