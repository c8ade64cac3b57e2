"""Rows for twins: small pictures of noise in many shapes, a prompt and an answer each."""

from collections.abc import Sequence
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image

from moadapt.bases import decoder_start
from moadapt.picture import Picture
from moadapt.task import Example
from moadapt.training.batch import Batch
from moadapt.training.collate import Collator, Item
from tests.bases.twins import NAMES, Twin

WRITERS = [name for name in NAMES if name not in ("bert", "vit", "dinov2")]
"""Twins that write text."""
SHAPES = [(32, 24), (16, 16), (20, 40), (64, 16)]
COUNTS = {
    "llama": (0, 0, 0),
    "gpt2": (0, 0, 0),
    "t5": (0, 0, 0),
    "paligemma": (2, 1, 3),
    "mllama": (2, 2, 2),
    "blip2": (1, 1, 1),
}
COUNTS["florence2"] = COUNTS["blip2"]


def counts_of(name: str) -> tuple[int, ...]:
    """Numbers of pictures of a batch's rows, as different as a class allows, none of them in the second row."""
    return COUNTS.get(name, (2, 0, 1, 3))


def items(name: str, answers: Sequence[str], counts: Sequence[int] | None = None) -> list[Item]:
    """Return rows with prompts of different lengths.

    Args:
        name: Of the twin.
        answers: The rows take turns.
        counts: How many pictures each row has.
    """
    noise = np.random.default_rng(0)
    rows = []
    for row, count in enumerate(counts_of(name) if counts is None else counts):
        shapes = [SHAPES[0 if name == "llava_pixtral" else (row + i) % len(SHAPES)] for i in range(count)]
        pictures = tuple(_picture(noise, shape, f"{row}-{i}.png") for i, shape in enumerate(shapes))
        prompt = "what?" + " really?" * row
        rows.append(Item("task", Example(pictures, prompt, (answers[row % len(answers)],), "", f"row {row}"), row))
    return rows


def collated(twin: Twin, rows: Sequence[Item], *, answers: bool) -> Batch:
    """Return the batch of some rows."""
    return collator(twin, answers=answers)(rows)


def collator(twin: Twin, *, answers: bool = True) -> Collator:
    """Return what makes batches of a twin."""
    return Collator(twin.processor, seed=0, answers=answers, decoder_start=decoder_start(twin.model.config))


def _picture(noise: np.random.Generator, shape: tuple[int, int], name: str) -> Picture:
    written = BytesIO()
    pixels = noise.integers(0, 256, (shape[1], shape[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(written, "PNG")
    return Picture(Path(name), shape, written.getvalue())
