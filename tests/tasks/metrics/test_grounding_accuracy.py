"""Grounding accuracy equals pixels counted one by one, refuses bad truths, and is the same on two processes."""

import math
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch

from moadapt_tasks.metrics import GroundingAccuracy
from moadapt_tasks.metrics.grounding_accuracy import box_iou

PREDS = [(0, 0, 10, 10), None, [2.0, 2.0, 6.0, 6.0], (0, 0, 4, 4), (5, 5, 1, 1)]
BOXES = [(0, 0, 10, 20), (5, 5, 9, 9), torch.tensor([2.0, 2.0, 6.0, 6.0]), (4, 0, 8, 4), (1, 1, 5, 5)]
IOUS = [0.5, 0.0, 1.0, 0.0, 0.0]


def score(preds: list[Any], boxes: list[Any], threshold: float = 0.5) -> dict[str, float]:
    metric = GroundingAccuracy(threshold)
    metric.update(preds, boxes)
    return {name: value.item() for name, value in metric.compute().items()}


def test_box_iou_equals_pixels_counted_one_by_one() -> None:
    draw = random.Random(0)

    def pixels(box: list[float]) -> set[tuple[int, int]]:
        return {(x, y) for x in range(int(box[0]), int(box[2])) for y in range(int(box[1]), int(box[3]))}

    for _ in range(200):
        boxes = []
        for _ in range(2):
            left, right = sorted(draw.sample(range(12), 2))
            top, bottom = sorted(draw.sample(range(12), 2))
            boxes.append([float(left), float(top), float(right), float(bottom)])
        first, second = (pixels(box) for box in boxes)
        assert box_iou(*boxes) == pytest.approx(len(first & second) / len(first | second), abs=1e-12)


def test_grounding_accuracy_of_five_boxes_by_hand() -> None:
    """Half the box, unreadable, equal, touching, and swapped corners: a hit of exactly 0.5 counts."""
    assert score(PREDS, BOXES) == pytest.approx({"accuracy": 2 / 5, "mean_iou": sum(IOUS) / 5}, abs=1e-12)


@pytest.mark.parametrize(("threshold", "hits"), [(0.1, 2), (0.5, 2), (0.51, 1), (1.0, 1)])
def test_grounding_accuracy_counts_from_its_threshold(threshold: float, hits: int) -> None:
    assert score(PREDS, BOXES, threshold)["accuracy"] == pytest.approx(hits / 5, abs=1e-12)


@pytest.mark.parametrize(
    "pred",
    [
        (0, 0, 0, 10),
        (3, 3, 3, 3),
        (10, 0, 0, 10),
        (0, 10, 10, 0),
        (0, 0, math.nan, 10),
        (-math.inf, 0, math.inf, 10),
        (0, 0, 1e308, 1e308),
    ],
)
def test_prediction_without_a_proper_area_is_a_miss(pred: tuple[float, ...]) -> None:
    assert score([pred], [(0, 0, 10, 10)]) == {"accuracy": 0.0, "mean_iou": 0.0}


@pytest.mark.parametrize(
    "box", [(0, 0, math.nan, 5), (0, 0, math.inf, 5), (0, 0, 0, 5), (50, 50, 20, 20), torch.zeros(4)]
)
def test_true_box_without_a_proper_area_is_refused_by_its_row(box: Any) -> None:
    metric = GroundingAccuracy()
    metric.update([(0, 0, 2, 2)], [(0, 0, 2, 2)])
    with pytest.raises(ValueError, match=r"boxes\[1\] is \[.*give finite left, top, right, bottom"):
        metric.update([None, None], [(0, 0, 1, 1), box])
    assert metric.compute()["accuracy"].item() == 1, "a refused batch must leave no trace"


@pytest.mark.parametrize(
    ("preds", "boxes", "named"),
    [([(0, 0, 1)], [(0, 0, 1, 1)], r"preds\[0\] has 3"), ([None], [(0, 0, 1, 1, 1)], r"boxes\[0\] has 5")],
)
def test_box_of_other_than_four_numbers_is_refused(preds: list[Any], boxes: list[Any], named: str) -> None:
    with pytest.raises(ValueError, match=f"{named} numbers; give left, top, right, bottom"):
        GroundingAccuracy().update(preds, boxes)


@pytest.mark.parametrize("threshold", [0.0, -0.5, 1.5, math.nan])
def test_threshold_outside_its_range_is_refused(threshold: float) -> None:
    with pytest.raises(ValueError, match="give an IoU above 0 and up to 1"):
        GroundingAccuracy(threshold)


def test_boxes_may_be_rows_of_tensors() -> None:
    boxes = torch.tensor([[0, 0, 10, 20], [1, 1, 5, 5]])
    assert score(list(boxes), list(boxes)) == {"accuracy": 1.0, "mean_iou": 1.0}


@pytest.mark.parametrize("cut", [0, 1, 3, 5])
def test_grounding_accuracy_on_two_processes_equals_one(
    on_two_processes: Callable[..., list[dict[str, float]]], cut: int
) -> None:
    for found in on_two_processes(GroundingAccuracy(), PREDS, BOXES, cut):
        assert found == pytest.approx(score(PREDS, BOXES), abs=1e-12)
