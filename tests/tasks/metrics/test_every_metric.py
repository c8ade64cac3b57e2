"""What all metrics share: checked rows, nan without rows, copies, and standing beside each other."""

import copy
import math
import pickle
from typing import Any

import pytest
import torch
from torchmetrics import Metric, MetricCollection

from moadapt_tasks.metrics import (
    ANLS,
    BLEU,
    ROUGEL,
    BoxSetAccuracy,
    ChoiceAccuracy,
    CIDErD,
    ExactMatch,
    GQAScores,
    GroundingAccuracy,
    NLVR2Scores,
    VQAAccuracy,
)

TEXT_METRICS = [VQAAccuracy, BLEU, ROUGEL, CIDErD, ANLS, ExactMatch]
QUESTION = {"id": "1", "answer": "red", "structural": "query", "semantic": "attr", "group": "color", "entailed": ["2"]}
ROWS: dict[type[Metric], tuple[list[Any], list[Any]]] = {
    VQAAccuracy: (["2", "red"], [["2"] * 2 + ["3"] * 8, ["red"]]),
    BLEU: (["a red dog", "a bus"], [["a dog", "the red dog"], ["a bus waits"]]),
    ROUGEL: (["a red dog", "a bus"], [["a dog", "the red dog"], ["a bus waits"]]),
    CIDErD: (["a red dog", "a bus"], [["a dog", "the red dog"], ["a bus waits"]]),
    ANLS: (["2", "red cup"], [["2", "3"], ["a cup", "the cup"]]),
    ExactMatch: (["2", "red"], [["2", "3"], ["a cup"]]),
    GQAScores: (
        ["red", "no"],
        [
            QUESTION | {"valid": ["red", "blue"], "plausible": ["blue"]},
            {"id": "2", "answer": "yes", "structural": "verify", "semantic": "attr"},
        ],
    ),
    NLVR2Scores: (
        ["true", "false"],
        [{"identifier": "dev-1-0-0", "label": "True"}, {"identifier": "dev-1-1-0", "label": "True"}],
    ),
    ChoiceAccuracy: (["B", ""], [{"right": "B", "options": ["red", "blue"]}, {"right": "A", "options": ["2", "3"]}]),
    GroundingAccuracy: ([(0, 0, 2, 2), None], [(0, 0, 2, 3), (0, 0, 1, 1)]),
    BoxSetAccuracy: ([[(0, 0, 2, 2)], None], [[(0, 0, 2, 3)], []]),
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
    of_batch = [value.item() for value in (found.values() if isinstance(found, dict) else [found])]
    assert of_batch == pytest.approx(numbers(second), abs=0, nan_ok=True)
    assert numbers(metric) == pytest.approx(numbers(filled(kind)), abs=1e-12)


@every_metric
def test_half_precision_leaves_the_sums_exact(kind: type[Metric]) -> None:
    module = torch.nn.ModuleDict({"metric": kind()}).half()
    metric = module["metric"]
    assert isinstance(metric, Metric)
    metric.update(*ROWS[kind])
    assert numbers(metric) == numbers(filled(kind))


BOX, FARTHER = (0, 0, 2, 2), (0, 0, 2, 3)
ALIKE: list[tuple[list[Metric], list[Any], list[Any]]] = [
    # Metrics, then two rows of predictions and references: all agree on the first row and differ on the second.
    (
        [ROUGEL(), VQAAccuracy(), BLEU(), CIDErD(), ANLS(), ANLS(0.9), ExactMatch(), ExactMatch("as_is")],
        ["dog", "a dog"],
        [["dog"], ["the dog", "dog"]],
    ),
    ([GroundingAccuracy(0.5), GroundingAccuracy(0.9)], [BOX, BOX], [BOX, FARTHER]),
    ([BoxSetAccuracy(0.5), BoxSetAccuracy(0.9)], [[BOX], [BOX]], [[BOX], [FARTHER]]),
    (
        [GQAScores(), NLVR2Scores()],
        ["true", "no"],
        [QUESTION | {"identifier": f"dev-1-{pair}-0", "label": "true", "id": str(pair)} for pair in range(2)],
    ),
]


@pytest.mark.parametrize(("metrics", "preds", "references"), ALIKE)
def test_metrics_that_agree_on_the_first_batch_stay_apart_in_a_collection(
    metrics: list[Metric], preds: list[Any], references: list[Any]
) -> None:
    """A collection merges metrics with equal state names and values; all of these are 1 of 1 after the first batch."""
    collection = MetricCollection({str(place): metric.clone() for place, metric in enumerate(metrics)})
    for start in range(2):
        collection.update(preds[start : start + 1], references[start : start + 1])
    for metric, lone in zip(collection.values(), metrics, strict=True):
        lone.update(preds, references)
        assert numbers(metric) == pytest.approx(numbers(lone), abs=1e-12, nan_ok=True)
