"""ANLS equals edits counted by hand and by searching all ways of editing, and itself on two processes."""

import random
from collections.abc import Callable
from functools import cache

import pytest

from moadapt_tasks.metrics import ANLS
from moadapt_tasks.metrics.anls import edit_distance, levenshtein_similarity

PREDS = ["Dr Pepper", "fanta", "42", "", "abcd"]
ANSWERS = [["dr. pepper", "Pepper"], ["cola", "Fanta "], ["24"], ["nothing", ""], ["abxx", "wxyz"]]
BY_HAND = [1 - 1 / 10, 1, 0, 1, 0]  # "42" and "24", "abcd" and "abxx" are half wrong, which is too much


def score(preds: list[str], answers: list[list[str]], threshold: float = 0.5) -> float:
    metric = ANLS(threshold)
    metric.update(preds, answers)
    return metric.compute().item()


def searched(left: str, right: str) -> int:
    """Edit distance by trying every first edit."""

    @cache
    def rest(i: int, j: int) -> int:
        if i == len(left) or j == len(right):
            return len(left) - i + len(right) - j
        if left[i] == right[j]:
            return rest(i + 1, j + 1)
        return 1 + min(rest(i + 1, j), rest(i, j + 1), rest(i + 1, j + 1))

    return rest(0, 0)


def test_edit_distance_equals_trying_every_edit() -> None:
    draw = random.Random(1)
    for _ in range(300):
        left, right = ("".join(draw.choices("abc", k=draw.randrange(8))) for _ in range(2))
        assert edit_distance(left, right) == searched(left, right)


@pytest.mark.parametrize(
    ("pred", "answer", "expected"),
    [
        ("  The\tRED  bus ", "the red bus", 1),
        ("redbus", "red bus", 1 - 1 / 7),
        ("", "", 1),
        ("", "a", 0),
        ("\u00e9t\u00e9", "ete", 0),  # two of three characters
        ("stra\u00dfe", "strasse", 1 - 2 / 7),
        ("ma\u00df", "mas", 1 - 1 / 4),  # "MASS" has four letters
    ],
)
def test_spaces_and_case_do_not_count_and_other_characters_do(pred: str, answer: str, expected: float) -> None:
    assert levenshtein_similarity(pred, answer, 0.5) == pytest.approx(expected, abs=1e-12)


def test_anls_is_the_mean_of_the_best_answers() -> None:
    assert score(PREDS, ANSWERS) == pytest.approx(sum(BY_HAND) / 5, abs=1e-12)


@pytest.mark.parametrize(("threshold", "expected"), [(0.25, 0), (0.26, 0.75), (1.0, 0.75)])
def test_share_of_edits_must_be_below_the_threshold(threshold: float, expected: float) -> None:
    assert score(["abcd"], [["abcx"]], threshold) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("threshold", [0, -0.5, 1.5])
def test_threshold_outside_its_range_is_refused(threshold: float) -> None:
    with pytest.raises(ValueError, match=f"threshold is {threshold}; give a share above 0 and up to 1"):
        ANLS(threshold)


@pytest.mark.parametrize("cut", [0, 2, 5])
def test_anls_on_two_processes_equals_one(on_two_processes: Callable[..., list[dict[str, float]]], cut: int) -> None:
    for found in on_two_processes(ANLS(), PREDS, ANSWERS, cut):
        assert found == pytest.approx({"value": sum(BY_HAND) / 5}, abs=1e-12)
