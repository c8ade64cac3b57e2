"""The columns of the table of results: where each number comes from, how it is written and what it means."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from moadapt.reporting.numerals import MISSING, count, fixed, known

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Column:
    """One column.

    Args:
        group: The task it belongs to; empty for costs.
        keys: Names of the value in a row or in the task's scores; the first one found counts.
        title: Heading.
        meaning: What it measures, in words.
        top: Highest possible value, as a row has it; None for costs, where less is better.
        factor: What a value is multiplied with before it is written.
        digits: Decimals.
    """

    group: str
    keys: tuple[str, ...]
    title: str
    meaning: str
    top: float | None = 1.0
    factor: float = 1.0
    digits: int = 3

    @property
    def name(self) -> str:
        """Its heading where the group does not stand above it."""
        name = self.title.split(",")[0]
        return f"{GROUPS[self.group]} {name}" if name.startswith("accuracy") else name

    def value(self, row: Row) -> float | None:
        """Return the number a row has, or None."""
        scores = (row.get(self.group) or {}) if self.group else row
        found = next((scores[key] for key in self.keys if key in scores), None)
        return float(found) if found is not None and known(found) else None

    def text(self, value: float | None) -> str:
        """Return the number as the table shows it."""
        if value is None:
            return MISSING
        return fixed(value * self.factor, self.digits) if self.digits else count(round(value * self.factor))


GROUPS = {"vqa": "VQA", "captioning": "Captioning", "grounding": "Grounding", "": "Cost"}

COLUMNS = (
    Column(
        "vqa",
        ("accuracy",),
        "accuracy,\N{NO-BREAK SPACE}%",
        "Share of questions answered as people answered them.",
        1,
        100,
        1,
    ),
    Column(
        "captioning",
        ("cider_d",),
        "CIDEr\N{NON-BREAKING HYPHEN}D",
        "How near a caption is to the reference captions, by the words that tell this picture from others; 0 to 10.",
        10,
        1,
        2,
    ),
    Column(
        "captioning",
        ("bleu4", "bleu_4"),
        "BLEU\N{NON-BREAKING HYPHEN}4",
        "Share of runs of up to four words found in a reference; 0 to 1.",
    ),
    Column(
        "captioning",
        ("rouge_l",),
        "ROUGE\N{NON-BREAKING HYPHEN}L",
        "Longest sequence of words shared with a reference; 0 to 1.",
    ),
    Column(
        "grounding",
        ("accuracy",),
        "accuracy@0.5,\N{NO-BREAK SPACE}%",
        "Share of boxes right: those that overlap the reference box by an IoU of at least 0.5.",
        1,
        100,
        1,
    ),
    Column(
        "grounding",
        ("mean_iou",),
        "mean IoU",
        "Intersection over union: the area two boxes share over the area they cover together; 0 to 1.",
    ),
    Column("", ("trainable_parameters",), "trainable parameters", "How many numbers were trained.", None, 1, 0),
    Column(
        "",
        ("step_ratio",),
        "step ratio",
        "Time of a training step over that of the same step through the bare base model.",
        None,
        1,
        2,
    ),
)
