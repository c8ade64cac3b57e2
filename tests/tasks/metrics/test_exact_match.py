"""Exact match compares spellings: SQuAD's equals torchmetrics', and the metric itself on two processes."""

import random
from collections.abc import Callable
from typing import Any

import pytest
from torchmetrics.functional.text import squad

from moadapt_tasks.metrics import ExactMatch

NASTY = [
    "The red bus.",
    "red bus",
    "a RED-bus!",
    "redbus",
    "An apple; a day",
    "the",
    "",
    "theory",
    "o'clock",
    "caf\u00e9 \u201cX\u201d",
    "two",
    "2",
    "dont",
    "don't",
    "  two\n",
]


def score(preds: list[str], references: list[list[str]], **options: Any) -> float:
    metric = ExactMatch(**options)
    metric.update(preds, references)
    return metric.compute().item()


@pytest.mark.parametrize(
    ("pred", "reference", "right"),
    [
        ("The red bus.", "red bus", {"squad", "vqa"}),
        ("two", "2", {"vqa"}),
        ("dont", "don't", {"squad", "vqa"}),
        ("red/bus", "redbus", {"squad"}),
        ("red/bus", "red bus", {"vqa"}),
        (" red \n bus", "red bus", {"squad", "vqa", "as_is"}),
        ("Red bus", "red bus", {"squad", "vqa"}),
        ("the", "a", {"squad", "vqa"}),
        ("red", "blue", set()),
    ],
)
def test_each_spelling_takes_its_own_for_equal(pred: str, reference: str, right: set[str]) -> None:
    found = {name for name in ("squad", "vqa", "as_is") if score([pred], [["other", reference]], spelling=name) == 1}
    assert found == right


def test_squad_spelling_equals_torchmetrics() -> None:
    draw = random.Random(2)
    preds = draw.choices(NASTY, k=200)
    references = [draw.choices(NASTY, k=3) for _ in preds]
    asked = [{"prediction_text": pred, "id": str(row)} for row, pred in enumerate(preds)]
    true = [{"answers": {"answer_start": [0] * 3, "text": row}, "id": str(i)} for i, row in enumerate(references)]
    expected = squad(asked, true)["exact_match"].item() / 100
    assert 0.2 < expected < 0.9
    assert score(preds, references) == pytest.approx(expected, abs=1e-6)  # theirs is in float32


def test_unknown_spelling_is_refused_with_those_there_are() -> None:
    with pytest.raises(ValueError, match="spelling is 'loose'; give one of squad, vqa, as_is"):
        ExactMatch(spelling="loose")  # type: ignore[arg-type]


@pytest.mark.parametrize("cut", [0, 1, 3])
def test_exact_match_on_two_processes_equals_one(
    on_two_processes: Callable[..., list[dict[str, float]]], cut: int
) -> None:
    for found in on_two_processes(ExactMatch(), ["a bus", "cat", "dog"], [["bus"], ["dog", "cat"], ["fox"]], cut):
        assert found == {"value": pytest.approx(2 / 3, abs=1e-12)}
