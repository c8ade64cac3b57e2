"""What all metrics share: checked rows, nan without rows, copies, and standing beside each other."""

import copy
import math
import pickle
from typing import Any

import pytest
import torch
from torchmetrics import Metric, MetricCollection

from moadapt_tasks.metrics import BLEU, ROUGEL, CIDErD, GroundingAccuracy, VQAAccuracy

TEXT_METRICS = [VQAAccuracy, BLEU, ROUGEL, CIDErD]
ROWS: dict[type[Metric], tuple[list[Any], list[Any]]] = {
    VQAAccuracy: (["2", "red"], [["2"] * 2 + ["3"] * 8, ["red"]]),
    BLEU: (["a red dog", "a bus"], [["a dog", "the red dog"], ["a bus waits"]]),
    ROUGEL: (["a red dog", "a bus"], [["a dog", "the red dog"], ["a bus waits"]]),
    CIDErD: (["a red dog", "a bus"], [["a dog", "the red dog"], ["a bus waits"]]),
    GroundingAccuracy: ([(0, 0, 2, 2), None], [(0, 0, 2, 3), (0, 0, 1, 1)]),
}
every_metric = pytest.mark.parametrize("kind", ROWS, ids=lambda kind: kind.__name__)
every_text_metric = pytest.mark.parametrize("kind", TEXT_METRICS, ids=lambda kind: kind.__name__)


def numbers(metric: Metric) -> list[float]:
    found = metric.compute()
    return [value.item() for value in (found.values() if isinstance(found, dict) else [found])]


def filled(kind: type[Metric]) -> Metric:
    metric = kind()
    metric.update(*ROWS[kind])
    return metric


@every_metric
def test_unequal_numbers_of_rows_are_refused_with_both(kind: type[Metric]) -> None:
    preds, targets = ROWS[kind]
    with pytest.raises(ValueError, match=r"preds has 1 rows and \w+ has 2; give one of each"):
        kind().update(preds[:1], targets)


@every_text_metric
@pytest.mark.parametrize(
    ("preds", "targets", "message"),
    [
        (["a", "b"], [["a"], []], r"\w+\[1\] is empty; give at least one text"),
        (["a", "b"], [["a"], "bb"], r"\w+\[1\] is 'bb'; give a list of str"),
        (["a", "b"], [["a"], [None]], r"\w+\[1\] is \[None\]; give a list of str"),
        (["a", None], [["a"], ["b"]], r"preds\[1\] is None, not a text"),
        ("ab", [["a"], ["b"]], r"preds is the single text 'ab'; give a list"),
        (["a", "b"], "ab", r"\w+ is the single text 'ab'; give a list"),
    ],
)
def test_rows_that_are_no_texts_are_refused_and_leave_no_trace(
    kind: type[Metric], preds: Any, targets: Any, message: str
) -> None:
    metric = filled(kind)
    with pytest.raises(ValueError, match=message):
        metric.update(preds, targets)
    assert numbers(metric) == numbers(filled(kind))


@every_metric
def test_compute_before_update_warns_and_is_nan(kind: type[Metric]) -> None:
    with pytest.warns(UserWarning, match="``compute`` method of metric"):
        assert all(math.isnan(value) for value in numbers(kind()))


@every_metric
def test_update_without_rows_changes_nothing(kind: type[Metric]) -> None:
    metric = filled(kind)
    metric.update([], [])
    assert numbers(metric) == numbers(filled(kind))


@every_metric
def test_copies_are_equal_and_apart(kind: type[Metric]) -> None:
    metric = filled(kind)
    copies = [copy.deepcopy(metric), pickle.loads(pickle.dumps(metric)), metric.clone()]
    metric.reset()
    for copied in copies:
        assert numbers(copied) == numbers(filled(kind))


@every_metric
def test_forward_gives_the_batch_and_adds_it(kind: type[Metric]) -> None:
    preds, targets = ROWS[kind]
    metric, second = kind(), kind()
    metric(preds[:1], targets[:1])
    found = metric(preds[1:], targets[1:])
    second.update(preds[1:], targets[1:])
    assert [value.item() for value in (found.values() if isinstance(found, dict) else [found])] == numbers(second)
    assert numbers(metric) == pytest.approx(numbers(filled(kind)), abs=1e-12)


@every_metric
def test_half_precision_leaves_the_sums_exact(kind: type[Metric]) -> None:
    module = torch.nn.ModuleDict({"metric": kind()}).half()
    metric = module["metric"]
    assert isinstance(metric, Metric)
    metric.update(*ROWS[kind])
    assert numbers(metric) == numbers(filled(kind))


def test_metrics_that_agree_on_the_first_batch_stay_apart_in_a_collection() -> None:
    """A collection merges metrics with equal state names and values; all of these are 1 of 1 after the first batch."""
    texts = MetricCollection([ROUGEL(), VQAAccuracy(), BLEU(), CIDErD()])
    boxes = MetricCollection({"from_half": GroundingAccuracy(0.5), "from_most": GroundingAccuracy(0.9)})
    texts.update(["dog"], [["dog"]])
    boxes.update([(0, 0, 2, 2)], [(0, 0, 2, 2)])
    texts.update(["a dog"], [["the dog", "dog"]])
    boxes.update([(0, 0, 2, 2)], [(0, 0, 2, 3)])
    alone = [ROUGEL(), VQAAccuracy(), BLEU(), CIDErD(), GroundingAccuracy(0.5), GroundingAccuracy(0.9)]
    for metric in alone[:4]:
        metric.update(["dog", "a dog"], [["dog"], ["the dog", "dog"]])
    for metric in alone[4:]:
        metric.update([(0, 0, 2, 2)] * 2, [(0, 0, 2, 2), (0, 0, 2, 3)])
    for collection, kinds in ((texts, alone[:4]), (boxes, alone[4:])):
        for metric, lone in zip(collection.values(), kinds, strict=True):
            assert numbers(metric) == pytest.approx(numbers(lone), abs=1e-12)
