"""NLVR2's accuracy and consistency equal their definition, and themselves on two processes."""

import random
from collections.abc import Callable

import pytest

from moadapt_tasks.metrics import NLVR2Scores
from moadapt_tasks.metrics.nlvr2_scores import NLVR2Reference, sentence


def truths(*identifiers: str, label: str = "True") -> list[NLVR2Reference]:
    return [{"identifier": identifier, "label": label} for identifier in identifiers]


def scores(preds: list[str], references: list[NLVR2Reference]) -> dict[str, float]:
    metric = NLVR2Scores()
    metric.update(preds, references)
    return {name: value.item() for name, value in metric.compute().items()}


def drawn() -> tuple[list[str], list[NLVR2Reference]]:
    draw = random.Random(4)
    asked = [f"test1-{group}-{pair}-{said}" for group in range(8) for pair in range(3) for said in range(2)]
    draw.shuffle(asked)
    labels: list[NLVR2Reference] = [{"identifier": name, "label": draw.choice(["True", "False"])} for name in asked]
    preds = [label["label"].lower() if draw.random() < 0.8 else draw.choice(["true", "no", ""]) for label in labels]
    return preds, labels


def test_pairs_of_one_sentence_stand_together_and_others_apart() -> None:
    assert sentence("dev-850-0-1") == sentence("dev-850-3-1")
    assert len({sentence(name) for name in ("dev-850-0-1", "dev-850-0-2", "dev-85-0-1", "test1-850-0-1")}) == 4


def test_sentence_is_consistent_where_all_of_its_pairs_are_right() -> None:
    references = truths("dev-1-0-0", "dev-1-1-0", "dev-1-0-1", "dev-2-0-0")
    assert scores(["true", "False", "TRUE", "true"], references) == {"accuracy": 3 / 4, "consistency": 2 / 3}


@pytest.mark.parametrize(
    ("pred", "label", "right"),
    [("true", "True", 1), ("FALSE", "False", 1), ("false", "True", 0), ("yes", "True", 0), ("", "False", 0)],
)
def test_only_the_two_words_are_judgements(pred: str, label: str, right: int) -> None:
    assert scores([pred], truths("dev-1-0-0", label=label)) == {"accuracy": right, "consistency": right}


def test_statement_given_twice_counts_once_as_judged_last() -> None:
    references = truths("dev-1-0-0", "dev-1-0-0", "dev-2-0-0")
    assert scores(["false", "true", "false"], references) == {"accuracy": 1 / 2, "consistency": 1 / 2}


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ({"identifier": "dev-1-0", "label": "True"}, "the identifier is 'dev-1-0'; give split-set-pair-sentence"),
        ({"identifier": "dev-1-0-0", "label": "maybe"}, r"references\[0\] has the label 'maybe'; give True or False"),
        ({"identifier": "dev-1-0-0"}, r"references\[0\] has None under 'label'; give a text"),
        ("dev-1-0-0", r"references\[0\] is 'dev-1-0-0'; give a mapping with identifier, label"),
    ],
)
def test_references_that_lack_something_are_refused(reference: NLVR2Reference, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        NLVR2Scores().update(["true"], [reference])


@pytest.mark.parametrize("cut", [0, 17, 48])
def test_nlvr2_on_two_processes_equals_the_definition(
    on_two_processes: Callable[..., list[dict[str, float]]], cut: int
) -> None:
    preds, references = drawn()
    wrong = [ref["identifier"] for p, ref in zip(preds, references, strict=True) if p != ref["label"].lower()]
    told = {(name.split("-")[1], name.split("-")[3]) for name in wrong}
    expected = {"accuracy": 1 - len(wrong) / 48, "consistency": 1 - len(told) / 16}
    assert 0 < expected["consistency"] < expected["accuracy"] < 1
    for found in on_two_processes(NLVR2Scores(), preds, references, cut):
        assert found == pytest.approx(expected, abs=1e-12)
