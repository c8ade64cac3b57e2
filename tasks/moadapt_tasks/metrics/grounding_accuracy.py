"""Grounding accuracy: how often a predicted box overlaps the true one well enough.

`IoU = |A and B| / |A or B|` in areas; a prediction is right where it reaches the threshold. Boxes are (left, top,
right, bottom) in pixels, the last two exclusive.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from moadapt_tasks.metrics.rows import check_rows

Box = Sequence[float] | Tensor


def box_iou(left: Sequence[float], right: Sequence[float]) -> float:
    """Return the overlap of two boxes over their union, 0 to 1.

    Args:
        left: A box (left, top, right, bottom). Without area, swapped or not finite it overlaps nothing.
        right: Another one.
    """
    if not (_has_area(left) and _has_area(right)):
        return 0.0
    width = min(left[2], right[2]) - max(left[0], right[0])
    height = min(left[3], right[3]) - max(left[1], right[1])
    shared = max(0.0, width) * max(0.0, height)
    return shared / (_area(left) + _area(right) - shared)


def _area(box: Sequence[float]) -> float:
    return (box[2] - box[0]) * (box[3] - box[1])


def _has_area(box: Sequence[float]) -> bool:
    return all(map(math.isfinite, box)) and box[0] < box[2] and box[1] < box[3]


def edges_of(box: Box, name: str) -> list[float]:
    """Return a box as four numbers.

    Args:
        box: Left, top, right, bottom.
        name: What it is called in messages.

    Raises:
        ValueError: It has not four numbers.
    """
    edges = [float(edge) for edge in (box.flatten().tolist() if isinstance(box, Tensor) else box)]
    if len(edges) != 4:
        raise ValueError(f"{name} has {len(edges)} numbers; give left, top, right, bottom in pixels")
    return edges


def true_box(box: Box, name: str) -> list[float]:
    """Return a true box as four numbers.

    Args:
        box: Left, top, right, bottom.
        name: What it is called in messages.

    Raises:
        ValueError: It has not four numbers, has no area or is not finite.
    """
    truth = edges_of(box, name)
    if not _has_area(truth):
        raise ValueError(
            f"{name} is {truth}; give finite left, top, right, bottom with left < right and top < bottom "
            "(not left, top, width, height)"
        )
    return truth


class GroundingAccuracy(Metric):
    """Share of predicted boxes that overlap the true box by at least a threshold, and the mean overlap.

    A prediction that could not be read (None), has no area, is swapped or is not finite is a miss of IoU 0.

    Args:
        threshold: The IoU from which a prediction is right, above 0 up to 1.
        **kwargs: Options of every torchmetrics metric.

    Raises:
        ValueError: `threshold` is outside its range.

    Example:
        >>> accuracy = GroundingAccuracy()
        >>> accuracy.update([(0, 0, 10, 10), None], [(0, 0, 10, 20), (5, 5, 9, 9)])
        >>> {name: value.item() for name, value in accuracy.compute().items()}
        {'accuracy': 0.5, 'mean_iou': 0.25}
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False

    grounding_iou: Tensor
    grounding_rows: Tensor

    def __init__(self, threshold: float = 0.5, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if not 0 < threshold <= 1:
            raise ValueError(f"threshold is {threshold}; give an IoU above 0 and up to 1 (0.5 is usual)")
        self.threshold = threshold
        # A MetricCollection merges metrics whose states bear equal names and happen to be equal after the first batch.
        self._hits = f"grounding_hits_{threshold}".replace(".", "_")
        self.add_state(self._hits, torch.tensor(0), dist_reduce_fx="sum")
        self.add_state("grounding_iou", torch.tensor(0.0, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("grounding_rows", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, preds: list[Box | None], boxes: list[Box]) -> None:
        """Add boxes.

        Args:
            preds: B predicted boxes (left, top, right, bottom) in pixels, or None where no box was found.
            boxes: B true boxes.

        Raises:
            ValueError: The lengths differ, a box has not four numbers, or a true box has no area or is not finite.
        """
        check_rows(preds, boxes, "boxes")
        truths = [true_box(box, f"boxes[{row}]") for row, box in enumerate(boxes)]
        found = [None if pred is None else edges_of(pred, f"preds[{row}]") for row, pred in enumerate(preds)]
        ious = [0.0 if pred is None else box_iou(pred, truth) for pred, truth in zip(found, truths, strict=True)]
        hits = sum(iou >= self.threshold for iou in ious)
        setattr(self, self._hits, getattr(self, self._hits) + hits)
        self.grounding_iou += math.fsum(ious)
        self.grounding_rows += len(ious)

    def compute(self) -> dict[str, Tensor]:
        """Return `accuracy` and `mean_iou`, both 0 to 1; nan where no boxes were given."""
        hits: Tensor = getattr(self, self._hits)
        return {
            "accuracy": hits.double() / self.grounding_rows,
            "mean_iou": self.grounding_iou / self.grounding_rows,
        }
