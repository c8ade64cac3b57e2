from pathlib import Path
from typing import Any

import pytest

from moadapt.task import Defect
from moadapt_tasks.records import Record, collect

FILE = Path("some.json")


def record(**values: Any) -> Record:
    return Record(FILE, "id 1", values)


@pytest.mark.parametrize("text", ["", " \n", 3, None, ["a"]])
def test_text_refuses(text: Any) -> None:
    with pytest.raises(Defect, match="id 1: its caption is "):
        record(caption=text).text("caption")


@pytest.mark.parametrize(
    "numbers", [None, "1234", [1, 2, 3], [1, 2, 3, "4"], [1, 2, 3, True], [0, 0, 1, float("nan")], [0, 0, 1, 10**400]]
)
def test_numbers_refuse(numbers: Any) -> None:
    with pytest.raises(Defect, match="give a list of 4 finite numbers"):
        record(bbox=numbers).numbers("bbox", 4)


def test_texts_are_those_of_a_list_or_of_its_objects() -> None:
    assert record(answers=["a ", "é\n"]).texts("answers") == ["a", "é"]
    assert record(answers=[{"answer": " a"}, {"answer": "b", "x": 1}]).texts("answers", "answer") == ["a", "b"]


@pytest.mark.parametrize(
    ("answers", "inner", "complaint"),
    [
        (["a", " "], None, r"id 1, answers\[1\]: its text is empty"),
        (["a", 3], None, r"id 1, answers\[1\]: its text is 3; give a text"),
        ([{"answer": "a"}, {"answer": ""}], "answer", r"id 1, answers\[1\]: its answer is empty"),
        ([{"answer": "a"}, {"text": "b"}], "answer", r"id 1, answers\[1\]: it has no 'answer'; it has: text"),
        ([{"answer": "a"}, "b"], "answer", r"id 1, answers\[1\]: it is 'b'; give a JSON object"),
        ([], None, r"id 1: its answers is \[\]; give a list with at least one text"),
        ([], "answer", r"id 1: its answers is \[\]; give a list with at least one object"),
        ("a", None, r"id 1: its answers is 'a'; give a list"),
        ({"answer": "a"}, "answer", r"id 1: its answers is \{'answer': 'a'\}; give a list"),
    ],
)
def test_texts_refuse(answers: Any, inner: str | None, complaint: str) -> None:
    with pytest.raises(Defect, match=complaint):
        record(answers=answers).texts("answers", inner)


def test_records_name_themselves_after_the_object_that_holds_them() -> None:
    first, second = record(parts=[{"part_id": 5}, {"x": 0}]).records("parts", "part_id")
    assert (first.entry, second.entry) == ("id 1, part_id 5", "id 1, parts[1]")


def test_collect_reports_each_defect_once_and_stops_at_the_limit() -> None:
    seen: list[int] = []

    def make(number: int) -> int:
        seen.append(number)
        if number < 2:
            raise record().wrong("too small")
        return number

    made, bad = collect(range(9), make, limit=2)
    assert (made, len(bad), seen) == ([2, 3], 1, [0, 1, 2, 3])
