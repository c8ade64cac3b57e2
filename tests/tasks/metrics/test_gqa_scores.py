"""GQA's scores equal the published definitions worked by hand and by loops, and themselves on two processes."""

import math
import random
from collections.abc import Callable
from typing import Any

import pytest

from moadapt_tasks.metrics import GQAScores
from moadapt_tasks.metrics.gqa_scores import GQAReference


def question(name: str, answer: str, **known: Any) -> GQAReference:
    types = {"structural": "query", "semantic": "attr"}
    return {"id": name, "answer": answer, **types, **known}  # type: ignore[typeddict-item]


def scores(preds: list[str], references: list[GQAReference]) -> dict[str, float]:
    metric = GQAScores()
    metric.update(preds, references)
    return {name: value.item() for name, value in metric.compute().items()}


def test_accuracy_is_told_by_type_of_question() -> None:
    references = [
        question("1", "red"),
        question("2", "dog", semantic="obj"),
        question("3", "yes", structural="verify"),
        question("4", "no", structural="logical", semantic="obj"),
    ]
    found = scores(["red", "cat", "yes", "no"], references)
    assert {name: value for name, value in found.items() if not math.isnan(value)} == {
        "accuracy": 3 / 4,
        "binary": 1,
        "open": 1 / 2,
        "structural/query": 1 / 2,
        "structural/verify": 1,
        "structural/logical": 1,
        "semantic/attr": 1,
        "semantic/obj": 1 / 2,
    }


@pytest.mark.parametrize("pred", ["Red", "red.", " red", "a red", ""])
def test_answers_are_compared_as_they_stand(pred: str) -> None:
    assert scores([pred], [question("1", "red")])["accuracy"] == 0


def test_consistency_is_over_what_right_answers_entail() -> None:
    """1 is right and entails one right and one wrong question, 2 itself and a right one, 3 is wrong, 4 entails none."""
    references = [
        question("1", "a", entailed=["2", "3"]),
        question("2", "b", entailed=["2", "1"]),
        question("3", "c", entailed=["1"]),
        question("4", "d"),
        question("5", "e", entailed=["unasked"]),
    ]
    assert scores(["a", "b", "?", "d", "e"], references)["consistency"] == pytest.approx((1 / 2 + 1) / 2, abs=1e-12)


def test_questions_outside_the_balanced_set_count_only_where_they_are_entailed() -> None:
    references = [
        question("1", "a", entailed=["2"]),
        question("2", "b", entailed=["1"], balanced=False, group="g", valid=["b"], structural="verify"),
    ]
    found = scores(["a", "?"], references)
    assert (found["accuracy"], found["consistency"]) == (1, 0)
    assert all(math.isnan(found[name]) for name in ("binary", "distribution", "validity"))
    assert "structural/verify" not in found


def test_validity_and_plausibility_are_over_questions_with_choices() -> None:
    references = [
        question("1", "a", valid=["a", "b"], plausible=["a"]),
        question("2", "a", valid=["a", "b"], plausible=[]),
        question("3", "a"),
    ]
    found = scores(["b", "a", "a"], references)
    assert (found["validity"], found["plausibility"]) == (1, 0)


def test_questions_for_what_is_common_have_three_valid_answers() -> None:
    references = [question(str(i), "color", detailed="twoCommon", valid=["red"], plausible=["red"]) for i in range(2)]
    found = scores(["shape", "red"], references)
    assert (found["validity"], found["plausibility"]) == (1 / 2, 1 / 2)


def test_distribution_is_chi_square_by_group() -> None:
    """Group one: 2 red given 1, 1 blue given 2, one of them for red. Group two is met exactly."""
    asked = [("1", "red", "one"), ("2", "red", "one"), ("3", "blue", "one"), ("4", "dog", "two"), ("5", "x", None)]
    references = [question(name, answer, group=group) for name, answer, group in asked]
    first = (1 - 2) ** 2 / 2 + (2 - 1) ** 2 / 1
    expected = (first * 3 + 0 * 1) / 4 / 100
    assert scores(["red", "blue", "blue", "dog", "y"], references)["distribution"] == pytest.approx(expected, abs=1e-12)


def test_answers_that_no_question_has_are_only_missing_from_the_distribution() -> None:
    references = [question(str(i), "red", group="one") for i in range(2)]
    assert scores(["red", "green"], references)["distribution"] == pytest.approx((1 - 2) ** 2 / 2 / 100, abs=1e-12)


def test_question_given_twice_counts_once_with_its_last_answer() -> None:
    assert scores(["b", "a", "?"], [question("1", "a"), question("1", "a"), question("2", "a")])["accuracy"] == 1 / 2


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ({"id": "1", "answer": "a", "structural": "query"}, r"references\[0\] has None under 'semantic'; give a text"),
        (question("1", "a", entailed="12"), r"references\[0\] has '12' under 'entailed'; give a list of str"),
        (question("1", "a", valid=[1]), r"references\[0\] has \[1\] under 'valid'; give a list of str"),
        (["a"], r"references\[0\] is \['a'\]; give a mapping with answer, id, semantic, structural"),
    ],
)
def test_references_that_lack_something_are_refused(reference: GQAReference, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GQAScores().update(["a"], [reference])


def drawn() -> tuple[list[str], list[GQAReference]]:
    draw = random.Random(6)
    words = ["red", "blue", "yes", "no"]
    references: list[GQAReference] = [
        {
            "id": f"0{name}",
            "answer": draw.choice(words),
            "structural": draw.choice(["query", "verify", "choose"]),
            "semantic": draw.choice(["obj", "rel"]),
            "detailed": draw.choice(["existTrue", "twoCommon"]),
            "balanced": draw.random() < 0.8,
            "entailed": [f"0{draw.randrange(60)}" for _ in range(draw.randrange(4))],
            "group": draw.choice([None, "one", "two", "three"]),
            "valid": draw.sample(words, 2),
            "plausible": draw.sample(words, 1),
        }
        for name in range(60)
    ]
    preds = [row["answer"] if draw.random() < 0.6 else draw.choice([*words, "shape"]) for row in references]
    return preds, references


def by_loops(preds: list[str], references: list[GQAReference]) -> dict[str, float]:
    """The published definitions, one list of points a score, as its program keeps them."""
    points: dict[str, list[float]] = {}
    counts: dict[Any, dict[str, list[int]]] = {}
    pred_of = dict(zip([row["id"] for row in references], preds, strict=True))
    answer_of = {row["id"]: row["answer"] for row in references}
    for row in references:
        if not row["balanced"]:
            continue
        pred = pred_of[row["id"]]
        right = float(pred == row["answer"])
        kinds = ["accuracy", "open" if row["structural"] == "query" else "binary"]
        for name in [*kinds, f"structural/{row['structural']}", f"semantic/{row['semantic']}"]:
            points.setdefault(name, []).append(right)
        for name, choices in (("validity", row["valid"]), ("plausibility", row["plausible"])):
            among = ["color", "material", "shape"] if "Common" in row["detailed"] else choices
            points.setdefault(name, []).append(float(pred in among))
        others = [name for name in row["entailed"] if name != row["id"]]
        if right and others:
            share = sum(pred_of[name] == answer_of[name] for name in others) / len(others)
            points.setdefault("consistency", []).append(share)
        if row["group"] is not None:
            group = counts.setdefault(row["group"], {})
            group.setdefault(row["answer"], [0, 0])[0] += 1
            group.setdefault(pred, [0, 0])[1] += 1
    chi = {g: sum((o - e) ** 2 / e for e, o in group.values() if e) for g, group in counts.items()}
    size = {g: sum(e for e, _ in group.values()) for g, group in counts.items()}
    distribution = sum(chi[g] * size[g] for g in chi) / sum(size.values()) / 100
    return {name: sum(found) / len(found) for name, found in points.items()} | {"distribution": distribution}


@pytest.mark.parametrize("cut", [0, 23, 60])
def test_gqa_on_two_processes_equals_the_published_loops(
    on_two_processes: Callable[..., list[dict[str, float]]], cut: int
) -> None:
    preds, references = drawn()
    expected = by_loops(preds, references)
    assert len(expected) == 12
    for found in on_two_processes(GQAScores(), preds, references, cut):
        assert found == pytest.approx(expected, abs=1e-12)
