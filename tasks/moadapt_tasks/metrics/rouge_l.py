"""ROUGE-L: the longest common subsequence of a caption and its references.

With `P` and `R` the subsequence's share of the prediction's and of the reference's words, each at its best over the
references, the score is `(1 + b^2) P R / (R + b^2 P)` with `b = 1.2`, averaged over captions. Lin 2004; `b` and the
separate maxima as in the public COCO caption evaluation.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from moadapt.registry import TEXT_METRICS
from moadapt_tasks.metrics.caption_tokens import spaced_caption_tokens
from moadapt_tasks.metrics.rows import check_text_rows

BETA = 1.2


def longest_common_subsequence(left: Sequence[str], right: Sequence[str]) -> int:
    """Return the length of the longest sequence that both hold in order, gaps allowed.

    Example:
        >>> longest_common_subsequence("a dog on grass".split(), "a big dog runs on it".split())
        3
    """
    lengths = [0] * (len(right) + 1)
    for word in left:
        diagonal = 0
        for place, other in enumerate(right, start=1):
            above = lengths[place]
            lengths[place] = diagonal + 1 if word == other else max(above, lengths[place - 1])
            diagonal = above
    return lengths[-1]


def rouge_l(pred: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Score one caption, 0 to 1.

    Args:
        pred: Words of the predicted caption. A caption without words counts as one empty word, as in the public
            evaluation, so it scores 0 unless a reference is empty too.
        references: Words of each reference, at least one.
    """
    words = pred or [""]
    targets = [reference or [""] for reference in references]
    common = [longest_common_subsequence(words, target) for target in targets]
    precision = max(common) / len(words)
    recall = max(length / len(target) for length, target in zip(common, targets, strict=True))
    if precision == 0 or recall == 0:
        return 0.0
    return (1 + BETA**2) * precision * recall / (recall + BETA**2 * precision)


@TEXT_METRICS.register("rouge_l")
class ROUGEL(Metric):
    """Mean ROUGE-L of captions, with the values of the public COCO caption evaluation.

    Args:
        **kwargs: Options of every torchmetrics metric.

    Example:
        >>> rouge = ROUGEL()
        >>> rouge.update(["a red cat"], [["A red dog runs."]])
        >>> round(rouge.compute().item(), 4)  # P = 2/3, R = 2/4
        0.5571
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False

    rouge_sum: Tensor
    rouge_rows: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("rouge_sum", torch.tensor(0.0, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("rouge_rows", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, preds: list[str], references: list[list[str]]) -> None:
        """Add captions.

        Args:
            preds: B predicted captions.
            references: The references of each, at least one.

        Raises:
            ValueError: The lengths differ or a row has no references.
        """
        check_text_rows(preds, references, "references")
        self.rouge_sum += math.fsum(
            rouge_l(spaced_caption_tokens(pred), [spaced_caption_tokens(text) for text in texts])
            for pred, texts in zip(preds, references, strict=True)
        )
        self.rouge_rows += len(preds)

    def compute(self) -> Tensor:
        """Return the mean over captions, 0 to 1; nan where none were given."""
        return self.rouge_sum / self.rouge_rows
