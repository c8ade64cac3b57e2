"""ROUGE-L equals a count by hand, a brute-force search, the public COCO evaluation, and itself on two processes."""

import random
from collections.abc import Callable
from itertools import combinations

import pytest

from moadapt_tasks.metrics import ROUGEL
from moadapt_tasks.metrics.rouge_l import longest_common_subsequence, rouge_l

Captions = tuple[list[str], list[list[str]]]


def score(preds: list[str], references: list[list[str]]) -> float:
    metric = ROUGEL()
    metric.update(preds, references)
    return metric.compute().item()


def harmonic(precision: float, recall: float) -> float:
    """Return the weighed harmonic mean: `(1 + b^2) / (1/R * b^2 + 1/P)` with b = 1.2."""
    return (1 + 1.44) / (1.44 / recall + 1 / precision)


def test_longest_common_subsequence_equals_a_search_through_all_subsequences() -> None:
    draw = random.Random(1)
    for _ in range(200):
        left = draw.choices("abc", k=draw.randint(0, 6))
        right = draw.choices("abc", k=draw.randint(0, 6))
        held = {part for size in range(len(right) + 1) for part in combinations(right, size)}
        longest = max(size for size in range(len(left) + 1) if held & set(combinations(left, size)))
        assert longest_common_subsequence(left, right) == longest


def test_rouge_l_keeps_order() -> None:
    """Of "dog red a" only one word stands in the order of "a red dog"."""
    assert score(["dog red a"], [["a red dog"]]) == pytest.approx(harmonic(1 / 3, 1 / 3), abs=1e-12)


def test_rouge_l_takes_precision_and_recall_from_different_references() -> None:
    """The long reference holds three words of four, the short one two of its two."""
    references = [["a red dog runs over the wide field"], ["red dog"]]
    assert score(["a red dog sleeps"], [[text for [text] in references]]) == pytest.approx(
        harmonic(3 / 4, 1), abs=1e-12
    )


def test_rouge_l_is_the_mean_over_captions() -> None:
    assert score(["a dog", "a cat"], [["a dog"], ["the bus"]]) == pytest.approx((1 + 0) / 2, abs=1e-12)


def test_rouge_l_counts_a_number_with_a_space_as_one_word() -> None:
    """As the public evaluation does: ["22 3/4", "miles"] and ["22", "miles"] share one word of two."""
    assert score(["22 3/4 miles"], [["22 miles"]]) == pytest.approx(harmonic(1 / 2, 1 / 2), abs=1e-12)


@pytest.mark.parametrize(
    ("pred", "references", "expected"),
    [([], [["a"]], 0.0), (["a"], [[]], 0.0), ([], [[]], 1.0), (["a"], [["a"], []], 1.0), (["b"], [["a"]], 0.0)],
)
def test_rouge_l_of_empty_captions(pred: list[str], references: list[list[str]], expected: float) -> None:
    assert rouge_l(pred, references) == pytest.approx(expected, abs=1e-12)


def test_rouge_l_equals_the_public_coco_evaluation(captions: Captions) -> None:
    """Printed by `Rouge().compute_score` of `pycocoevalcap` 1.2 on these captions after its `PTBTokenizer`."""
    assert score(*captions) == pytest.approx(0.5687703028064488, abs=1e-12)


def test_rouge_l_in_batches_equals_rouge_l_at_once(captions: Captions) -> None:
    metric = ROUGEL()
    for pred, texts in zip(*captions, strict=True):
        metric.update([pred], [texts])
    assert metric.compute().item() == pytest.approx(score(*captions), abs=1e-12)


@pytest.mark.parametrize("cut", [0, 2, 3, 7])
def test_rouge_l_on_two_processes_equals_one(
    captions: Captions, on_two_processes: Callable[..., list[dict[str, float]]], cut: int
) -> None:
    for found in on_two_processes(ROUGEL(), *captions, cut):
        assert found == pytest.approx({"value": score(*captions)}, abs=1e-12)
