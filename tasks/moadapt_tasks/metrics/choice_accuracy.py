"""Accuracy of multiple choice: how often the letter of the right option is chosen."""

from collections.abc import Sequence
from typing import Any, TypedDict

import torch
from torch import Tensor
from torchmetrics import Metric

from moadapt_tasks.metrics.rows import check_keys, check_preds, check_rows


class ChoiceReference(TypedDict):
    """What is known of a row, as `Example.reference` holds it."""

    right: str
    """Letter of the right option."""
    options: Sequence[str]
    """What there was to choose from, in the order of the letters; for the task to read answers by."""


class ChoiceAccuracy(Metric):
    """Share of rows whose right option was chosen.

    Args:
        **kwargs: Options of every torchmetrics metric.

    Example:
        >>> accuracy = ChoiceAccuracy()
        >>> asked = {"right": "B", "options": ["red", "blue"]}
        >>> accuracy.update(["B", "A", ""], [asked, asked, asked])
        >>> round(accuracy.compute().item(), 4)
        0.3333
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False

    choice_hits: Tensor
    choice_rows: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("choice_hits", torch.tensor(0), dist_reduce_fx="sum")
        self.add_state("choice_rows", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, preds: list[str], references: Sequence[ChoiceReference]) -> None:
        """Add rows.

        Args:
            preds: B chosen letters; the empty text where none was chosen.
            references: The right letter of each, and its options.

        Raises:
            ValueError: The lengths differ, or a row is no text or lacks its right letter.
        """
        check_rows(preds, references, "references")
        check_preds(preds)
        check_keys(references, ["right"])
        self.choice_hits += sum(pred == reference["right"] for pred, reference in zip(preds, references, strict=True))
        self.choice_rows += len(preds)

    def compute(self) -> Tensor:
        """Return the share, 0 to 1; nan where no rows were given."""
        return self.choice_hits.double() / self.choice_rows
