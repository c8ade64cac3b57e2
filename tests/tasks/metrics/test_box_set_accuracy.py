"""Accuracy of any number of boxes equals GREC's definition, worked out here, and is the same on two processes."""

import itertools
import math
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch

from moadapt_tasks.metrics import BoxSetAccuracy, GroundingAccuracy
from moadapt_tasks.metrics.box_set_accuracy import matched_pairs
from moadapt_tasks.metrics.grounding_accuracy import box_iou

A, B, C = (0, 0, 10, 10), (20, 0, 30, 10), (40, 40, 50, 60)
HALF = (0, 0, 10, 5)
"""Half of A."""
PREDS = [[B, A], [A, B], [HALF], [A], [], None, [], [A, A], [C], None, [A, B, C], [(5, 5, 1, 1)]]
BOXES = [[A, B], [A], [A], [A, B], [], [], [A], [A], [], [C], [C, A, B], [A]]
RIGHT = [1, 0, 1, 0, 1, 0, 0, 0, 0, 0, 1, 0]


def score(preds: list[Any], boxes: list[Any], threshold: float = 0.5) -> dict[str, float]:
    metric = BoxSetAccuracy(threshold)
    metric.update(preds, boxes)
    return {name: value.item() for name, value in metric.compute().items()}


def test_accuracy_of_rows_by_hand() -> None:
    """Without true boxes are rows 4, 5 and 8; of the others, rows 6 and 9 tell none."""
    wanted = {"accuracy": sum(RIGHT) / 12, "n_acc": 1 / 3, "t_acc": 7 / 9}
    assert score(PREDS, BOXES) == pytest.approx(wanted, abs=1e-12)
    for pred, boxes, right in zip(PREDS, BOXES, RIGHT, strict=True):
        assert score([pred], [boxes])["accuracy"] == right, (pred, boxes)


def test_rows_of_random_boxes_are_right_where_f1_is_one() -> None:
    """F1 with pairs made one at a time, each the best that is left, as GREC makes them."""
    draw = random.Random(5)

    def some_boxes() -> list[tuple[int, int, int, int]]:
        corners = [(draw.randrange(3), draw.randrange(3)) for _ in range(draw.randrange(4))]
        return [(x, y, x + draw.randint(2, 4), y + draw.randint(2, 4)) for x, y in corners]

    def f1(pred: list[Any], boxes: list[Any]) -> float:
        if not boxes:
            return float(not pred)
        left = {(i, j): box_iou(pred[i], boxes[j]) for i, j in itertools.product(range(len(pred)), range(len(boxes)))}
        pairs = 0
        while left and max(left.values()) >= 0.5:
            best = max(left, key=lambda pair: left[pair])
            left = {(i, j): iou for (i, j), iou in left.items() if i != best[0] and j != best[1]}
            pairs += 1
        return 2 * pairs / (len(pred) + len(boxes))

    rows = [(some_boxes(), some_boxes()) for _ in range(3000)]
    wanted = [f1(*row) == 1 for row in rows]
    assert 0.05 < sum(wanted) / len(wanted) < 0.5, "both kinds must be common"
    found = score([row[0] for row in rows], [row[1] for row in rows])
    assert found["accuracy"] == pytest.approx(sum(wanted) / len(rows), abs=1e-12)


def test_each_box_is_in_one_pair_the_best_first() -> None:
    wide, narrow = (0, 0, 10, 12), (0, 0, 10, 9)
    assert matched_pairs([A, A], [A], 0.5) == 1
    assert matched_pairs([narrow, wide], [A, A], 0.5) == 2
    assert matched_pairs([wide], [narrow, A], 0.8) == 1
    assert matched_pairs([], [A], 0.5) == matched_pairs([A], [], 0.5) == matched_pairs([A], [B], 0.5) == 0


@pytest.mark.parametrize("threshold", [0.3, 0.5, 0.9])
def test_rows_of_one_box_are_right_as_in_grounding_accuracy(threshold: float) -> None:
    draw = random.Random(1)
    pairs = [[(x, 0, x + 5, 5) for x in (draw.uniform(0, 5), draw.uniform(0, 5))] for _ in range(300)]
    alone = GroundingAccuracy(threshold)
    alone.update([pred for pred, _ in pairs], [box for _, box in pairs])
    sets = score([[pred] for pred, _ in pairs], [[box] for _, box in pairs], threshold)
    assert sets["accuracy"] == alone.compute()["accuracy"].item()


def test_scores_of_rows_that_are_not_there_are_nan() -> None:
    assert math.isnan(score([[A]], [[A]])["n_acc"])
    assert math.isnan(score([[]], [[]])["t_acc"])


@pytest.mark.parametrize(
    ("preds", "boxes", "message"),
    [
        ([[A], [A, (0, 0, 1)]], [[A], [A]], r"preds\[1\]\[1\] has 3 numbers"),
        ([[A], [A]], [[A], [A, (0, 0, 1, 1, 1)]], r"boxes\[1\]\[1\] has 5 numbers"),
        ([[A], [A]], [[A], [(50, 50, 20, 20)]], r"boxes\[1\]\[0\] is \[50.0, .*give finite left, top, right, bottom"),
        ([[A], [A]], [[A], [(0, 0, math.nan, 20)]], r"boxes\[1\]\[0\] is "),
    ],
)
def test_what_is_no_box_is_refused_and_leaves_no_trace(preds: list[Any], boxes: list[Any], message: str) -> None:
    metric = BoxSetAccuracy()
    metric.update([[A]], [[A]])
    with pytest.raises(ValueError, match=message):
        metric.update(preds, boxes)
    assert metric.compute()["accuracy"].item() == 1


def test_boxes_may_be_tensors() -> None:
    rows = torch.tensor([[A, B], [A, C]])
    assert score(list(rows), list(rows.flip(1)))["accuracy"] == 1


@pytest.mark.parametrize("threshold", [0.0, -0.5, 1.5, math.nan])
def test_threshold_outside_its_range_is_refused(threshold: float) -> None:
    with pytest.raises(ValueError, match="give an IoU above 0 and up to 1"):
        BoxSetAccuracy(threshold)


@pytest.mark.parametrize("cut", [0, 3, 12])
def test_accuracy_on_two_processes_equals_one(
    on_two_processes: Callable[..., list[dict[str, float]]], cut: int
) -> None:
    for found in on_two_processes(BoxSetAccuracy(), PREDS, BOXES, cut):
        assert found == pytest.approx(score(PREDS, BOXES), abs=1e-12)
