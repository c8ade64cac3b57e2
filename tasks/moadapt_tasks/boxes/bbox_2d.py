"""The JSON in which Qwen-VL models list boxes: `[{"bbox_2d": [left, top, right, bottom], "label": "cat"}]`, fenced."""

import json
from collections.abc import Sequence

from moadapt_tasks.boxes.bracketed import write_numbers
from moadapt_tasks.boxes.views import Box

NOTHING = "```json\n[]\n```"
"""A list of no boxes."""


def write_list(boxes: Sequence[Box], steps: tuple[int, int], label: str) -> str:
    """Return the list of boxes, one a line.

    Args:
        boxes: In fractions of the sides.
        steps: How many there are from left to right, and from top to bottom.
        label: What each of them shows.
    """
    name = json.dumps(label, ensure_ascii=False)
    lines = ",\n".join(f'\t{{"bbox_2d": {write_numbers(box, steps)}, "label": {name}}}' for box in boxes)
    return f"```json\n[\n{lines}\n]\n```"
