"""ANLS: how few edits an answer is away from one of those that people gave; for text read in documents and scenes.

`1 - d / l` with `d` the edit distance of two answers and `l` the longer one's length, 0 where `d / l` is not below the
threshold; the best over a question's answers, averaged over questions. Biten et al. 2019 (arXiv:1907.00490, ST-VQA),
Mathew et al. 2021 (arXiv:2007.00398, DocVQA). Case does not count and runs of spaces count as one. Where exactly half
of an answer is wrong the papers give 0, and so does this; some programs give 0.5.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from moadapt.registry import TEXT_METRICS
from moadapt_tasks.metrics.rows import check_text_rows


def edit_distance(left: str, right: str) -> int:
    """Return the smallest number of characters to insert, delete or replace that makes one text the other.

    Example:
        >>> edit_distance("kitten", "sitting")
        3
    """
    distances = list(range(len(right) + 1))
    for row, character in enumerate(left, start=1):
        diagonal, distances[0] = distances[0], row
        for column, other in enumerate(right, start=1):
            replaced = diagonal + (character != other)
            diagonal = distances[column]
            distances[column] = min(replaced, diagonal + 1, distances[column - 1] + 1)
    return distances[-1]


def levenshtein_similarity(pred: str, answer: str, threshold: float) -> float:
    """Score an answer against one that a person gave, 0 to 1."""
    given, expected = (" ".join(text.strip().lower().split()) for text in (pred, answer))
    longest = max(len(given.upper()), len(expected.upper()))  # in capitals, where "ß" is two, as published programs do
    share = edit_distance(given, expected) / longest if longest else 0.0
    return 1 - share if share < threshold else 0.0


@TEXT_METRICS.register("anls")
class ANLS(Metric):
    """Average normalised Levenshtein similarity of answers.

    Args:
        threshold: The share of an answer that must be wrong for a score of 0, above 0 up to 1.
        **kwargs: Options of every torchmetrics metric.

    Raises:
        ValueError: `threshold` is outside its range.

    Example:
        >>> anls = ANLS()
        >>> anls.update(["Dr Pepper", "fanta"], [["dr. pepper", "Pepper"], ["cola"]])
        >>> round(anls.compute().item(), 4)  # one edit in ten characters; nothing alike
        0.45
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False

    anls_rows: Tensor

    def __init__(self, threshold: float = 0.5, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if not 0 < threshold <= 1:
            raise ValueError(f"threshold is {threshold}; give a share above 0 and up to 1 (0.5 is usual)")
        self.threshold = threshold
        # A MetricCollection merges metrics whose states bear equal names and happen to be equal after the first batch.
        self._sum = f"anls_sum_{threshold}".replace(".", "_")
        self.add_state(self._sum, torch.tensor(0.0, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("anls_rows", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, preds: list[str], answers: list[list[str]]) -> None:
        """Add questions.

        Args:
            preds: B predicted answers.
            answers: The answers that count as right for each question, at least one.

        Raises:
            ValueError: The lengths differ or a row has no answers.
        """
        check_text_rows(preds, answers, "answers")
        setattr(self, self._sum, getattr(self, self._sum) + math.fsum(map(self._score, preds, answers)))
        self.anls_rows += len(preds)

    def compute(self) -> Tensor:
        """Return the mean over questions, 0 to 1; nan where none were given."""
        total: Tensor = getattr(self, self._sum)
        return total / self.anls_rows

    def _score(self, pred: str, answers: Sequence[str]) -> float:
        return max(levenshtein_similarity(pred, answer, self.threshold) for answer in answers)
