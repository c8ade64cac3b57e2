"""VQA accuracy equals the rule worked by hand, the rule run over positions, and itself on two processes."""

import random
from collections.abc import Callable

import pytest

from moadapt_tasks.metrics import VQAAccuracy
from moadapt_tasks.metrics.vqa_accuracy import agreement, vqa_accuracy
from moadapt_tasks.metrics.vqa_answers import normalise_answer

PREDS = ["yes", "Two", "the dog", "red", "unknown", "Blue."]
ANSWERS = [
    ["yes"] * 8 + ["no"] * 2,
    ["2"] * 3 + ["3"] * 7,
    ["dog"] * 2 + ["a dog"] * 2 + ["cat"] * 6,
    ["red"],
    ["left"] * 10,
    ["blue", "green", "blue"],
]


def score(preds: list[str], answers: list[list[str]]) -> float:
    metric = VQAAccuracy()
    metric.update(preds, answers)
    return metric.compute().item()


@pytest.mark.parametrize(
    ("matches", "expected"),
    [
        (0, 0.0),
        (1, (1 * 0 + 9 * 1 / 3) / 10),
        (2, (2 * 1 / 3 + 8 * 2 / 3) / 10),
        (3, (3 * 2 / 3 + 7 * 1) / 10),
        (4, 1.0),
        (10, 1.0),
    ],
)
def test_agreement_with_some_of_ten_humans(matches: int, expected: float) -> None:
    """A human among the matching ones sees one match fewer than a human outside does."""
    assert agreement(matches, humans=10) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("humans", [4, 5, 10])
def test_agreement_equals_the_official_rule_over_positions(humans: int) -> None:
    draw = random.Random(humans)
    for _ in range(50):
        answers = [draw.choice(["a1", "b1", "c1"]) for _ in range(humans)]
        shares = [min(1, (answers[:left] + answers[left + 1 :]).count("a1") / 3) for left in range(humans)]
        assert agreement(answers.count("a1"), humans) == pytest.approx(sum(shares) / humans, abs=1e-12)


@pytest.mark.parametrize(
    ("matches", "humans", "expected"),
    [
        (0, 1, 0),
        (1, 1, 1),
        (1, 2, 1 / 2),  # the human who says it sees no match, the other one sees all there can be
        (2, 2, 1),
        (1, 3, (0 + 1 / 2 + 1 / 2) / 3),
        (2, 3, (1 / 2 + 1 / 2 + 1) / 3),
        (3, 3, 1),
    ],
)
def test_agreement_of_fewer_than_four_humans_reaches_one(matches: int, humans: int, expected: float) -> None:
    assert agreement(matches, humans) == pytest.approx(expected, abs=1e-12)


def test_answers_are_compared_as_they_stand_where_all_humans_agree() -> None:
    assert vqa_accuracy("Yes", ["yes"] * 10) == 0
    assert vqa_accuracy("Yes", ["Yes"] * 10) == 1
    assert vqa_accuracy(" yes\n", ["yes ", *["yes"] * 9]) == 1


def test_answers_are_normalised_where_humans_differ() -> None:
    assert vqa_accuracy("Yes!", ["yes"] * 9 + ["no"]) == 1
    assert vqa_accuracy("yes", ["Yes."] * 9 + ["no"]) == 1


def test_answer_of_a_single_human_is_normalised() -> None:
    assert vqa_accuracy("Yes!", ["yes"]) == 1


def test_answers_that_differ_only_in_spelling_match_together() -> None:
    assert vqa_accuracy("dog", ["dog", "a dog", "The Dog", "dog."] + ["cat"] * 6) == 1


def test_vqa_accuracy_is_the_mean_over_questions() -> None:
    by_hand = [1, 0.9, 1, 1, 0, 2 / 3]
    assert score(PREDS, ANSWERS) == pytest.approx(sum(by_hand) / 6, abs=1e-12)


def test_vqa_accuracy_equals_the_official_rule_on_random_answers() -> None:
    draw = random.Random(5)
    spellings = ["yes", "Yes", "no", "No.", "a dog", "dog", "2", "two", "1,000", "dont", "don't", "x/y", "x y"]
    answers = [draw.choices(spellings, k=10) for _ in range(60)]
    preds = draw.choices(spellings, k=60)
    total = 0.0
    for pred, row in zip(preds, answers, strict=True):
        assert len(set(row)) > 1
        spelled = [normalise_answer(answer) for answer in row]
        for left in range(10):
            total += min(1, (spelled[:left] + spelled[left + 1 :]).count(normalise_answer(pred)) / 3) / 10
    assert score(preds, answers) == pytest.approx(total / 60, abs=1e-12)


def test_vqa_accuracy_in_batches_equals_at_once() -> None:
    metric = VQAAccuracy()
    for pred, row in zip(PREDS, ANSWERS, strict=True):
        metric.update([pred], [row])
    assert metric.compute().item() == pytest.approx(score(PREDS, ANSWERS), abs=1e-12)


@pytest.mark.parametrize("cut", [0, 1, 3, 6])
def test_vqa_accuracy_on_two_processes_equals_one(
    on_two_processes: Callable[..., list[dict[str, float]]], cut: int
) -> None:
    for found in on_two_processes(VQAAccuracy(), PREDS, ANSWERS, cut):
        assert found == pytest.approx({"value": score(PREDS, ANSWERS)}, abs=1e-12)
