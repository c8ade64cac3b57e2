"""Accuracy of expressions that refer to any number of boxes: `Precision@(F1=1, IoU>=0.5)`, N-acc and T-acc of GREC.

Predicted and true boxes are paired greedily, the largest IoU first, each in one pair, as long as the IoU reaches the
threshold. A row's `F1 = 2 TP / (2 TP + FP + FN)`, and it is right where that is 1: every box found and none too many.
A row without true boxes is right where none is predicted. He et al. 2023, "GREC: Generalized Referring Expression
Comprehension", arXiv:2308.16182, section 3. The paper's text says IoU, as here; its script compares with GIoU, which is
never larger.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from moadapt_tasks.metrics.grounding_accuracy import Box, box_iou, edges_of, true_box
from moadapt_tasks.metrics.rows import check_rows


def matched_pairs(preds: Sequence[Sequence[float]], boxes: Sequence[Sequence[float]], threshold: float) -> int:
    """Return how many pairs of a predicted and a true box are made, the largest IoU first.

    Args:
        preds: Predicted boxes.
        boxes: True boxes.
        threshold: Least IoU of a pair.
    """
    ious = [(box_iou(pred, box), row, column) for row, pred in enumerate(preds) for column, box in enumerate(boxes)]
    rows: set[int] = set()
    columns: set[int] = set()
    for iou, row, column in sorted(ious, key=lambda pair: -pair[0]):
        if iou >= threshold and row not in rows and column not in columns:
            rows.add(row)
            columns.add(column)
    return len(rows)


class BoxSetAccuracy(Metric):
    """Share of rows whose boxes are all found with none too many, and how well rows with and without boxes are told.

    `accuracy` is over all rows. `n_acc` is the share of rows without true boxes for which none was predicted, `t_acc`
    the share of the others for which any was. A prediction that could not be read (None) is right nowhere; a predicted
    box without area, swapped or not finite counts and matches nothing.

    Args:
        threshold: The IoU from which two boxes match, above 0 up to 1.
        **kwargs: Options of every torchmetrics metric.

    Raises:
        ValueError: `threshold` is outside its range.

    Example:
        >>> accuracy = BoxSetAccuracy()
        >>> two = [(0, 0, 10, 10), (20, 0, 30, 10)]
        >>> accuracy.update([two[::-1], two[:1], [], [(0, 0, 5, 5)]], [two, two, [], []])
        >>> {name: value.item() for name, value in accuracy.compute().items()}
        {'accuracy': 0.5, 'n_acc': 0.5, 't_acc': 1.0}
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False

    def __init__(self, threshold: float = 0.5, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if not 0 < threshold <= 1:
            raise ValueError(f"threshold is {threshold}; give an IoU above 0 and up to 1 (0.5 is usual)")
        self.threshold = threshold
        # A MetricCollection merges metrics whose states bear equal names and happen to be equal after the first batch.
        self._counts = f"box_set_counts_{threshold}".replace(".", "_")
        self.add_state(self._counts, torch.zeros(5, dtype=torch.long), dist_reduce_fx="sum")

    def update(self, preds: list[Sequence[Box] | None], boxes: list[Sequence[Box]]) -> None:
        """Add rows.

        Args:
            preds: B lists of predicted boxes (left, top, right, bottom) in pixels, or None where nothing could be read.
            boxes: B lists of true boxes, maybe empty.

        Raises:
            ValueError: The lengths differ, a box has not four numbers, or a true box has no area or is not finite.
        """
        check_rows(preds, boxes, "boxes")
        truths = [[true_box(box, f"boxes[{r}][{b}]") for b, box in enumerate(row)] for r, row in enumerate(boxes)]
        found = [
            None if row is None else [edges_of(box, f"preds[{r}][{b}]") for b, box in enumerate(row)]
            for r, row in enumerate(preds)
        ]
        counts: Tensor = getattr(self, self._counts)
        for pred, truth in zip(found, truths, strict=True):
            counts += torch.tensor(self._judged(pred, truth), device=counts.device)

    def compute(self) -> dict[str, Tensor]:
        """Return `accuracy`, `n_acc` and `t_acc`, all 0 to 1; nan where no such rows were given."""
        counts: Tensor = getattr(self, self._counts)
        right, empty, none_told, filled, some_told = counts.double()
        return {"accuracy": right / (empty + filled), "n_acc": none_told / empty, "t_acc": some_told / filled}

    def _judged(self, pred: list[list[float]] | None, truth: list[list[float]]) -> tuple[bool, bool, bool, bool, bool]:
        """Return whether a row is right, without true boxes, told so, with true boxes, told so."""
        filled, told = bool(truth), pred is not None and bool(pred) == bool(truth)
        right = told and len(pred or ()) == len(truth) == matched_pairs(pred or (), truth, self.threshold)
        return right, not filled, told and not filled, filled, told and filled
