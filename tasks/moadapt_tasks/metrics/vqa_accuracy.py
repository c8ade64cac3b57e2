"""VQA accuracy: an answer is as right as humans agree on it.

For each human the other humans' answers that equal the prediction are counted, `min(1, matches / 3)` taken, and the
mean over humans is the question's accuracy. Antol et al. 2015 (arXiv:1505.00468); here as in the official VQA v2
evaluation.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from moadapt.registry import TEXT_METRICS
from moadapt_tasks.metrics.rows import check_text_rows
from moadapt_tasks.metrics.vqa_answers import normalise_answer, strip_answer

ENOUGH = 3  # humans that must agree for full accuracy


def agreement(matches: int, humans: int) -> float:
    """Return the accuracy of an answer that `matches` of `humans` humans gave, 0 to 1.

    From four humans on this is the official accuracy. It needs three others to agree, which fewer humans cannot give;
    with two or three all others must agree, and one human's answer counts in full.
    """
    if humans == 1:
        return float(matches)
    enough = min(ENOUGH, humans - 1)
    from_matching = min(1.0, (matches - 1) / enough)
    from_others = min(1.0, matches / enough)
    return (matches * from_matching + (humans - matches) * from_others) / humans


def vqa_accuracy(pred: str, answers: Sequence[str]) -> float:
    """Score the answer to one question, 0 to 1.

    Where all humans agree to the letter, prediction and answers are compared as they stand, as the official code does:
    ten times "yes" makes "Yes" wrong. One human alone is not agreement; both sides are then normalised.

    Args:
        pred: The predicted answer.
        answers: The humans' answers, at least one.
    """
    given = strip_answer(pred)
    expected = [strip_answer(answer) for answer in answers]
    if len(expected) == 1 or len(set(expected)) > 1:
        given = normalise_answer(given)
        expected = [normalise_answer(answer) for answer in expected]
    return agreement(expected.count(given), len(expected))


@TEXT_METRICS.register("vqa_accuracy")
class VQAAccuracy(Metric):
    """Mean VQA accuracy, with the values of the official VQA v2 evaluation for questions of four humans or more.

    Args:
        **kwargs: Options of every torchmetrics metric.

    Example:
        >>> accuracy = VQAAccuracy()
        >>> accuracy.update(["Two"], [["2"] * 2 + ["3"] * 8])
        >>> round(accuracy.compute().item(), 4)  # (2 * 1/3 + 8 * 2/3) / 10
        0.6
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False

    vqa_sum: Tensor
    vqa_rows: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("vqa_sum", torch.tensor(0.0, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("vqa_rows", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, preds: list[str], answers: list[list[str]]) -> None:
        """Add questions.

        Args:
            preds: B predicted answers.
            answers: The humans' answers to each question, at least one.

        Raises:
            ValueError: The lengths differ or a row has no answers.
        """
        check_text_rows(preds, answers, "answers")
        self.vqa_sum += math.fsum(vqa_accuracy(pred, texts) for pred, texts in zip(preds, answers, strict=True))
        self.vqa_rows += len(preds)

    def compute(self) -> Tensor:
        """Return the mean over questions, 0 to 1; nan where none were given."""
        return self.vqa_sum / self.vqa_rows
