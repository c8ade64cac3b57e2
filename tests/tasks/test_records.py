from pathlib import Path
from typing import Any

import pytest

from moadapt_tasks.records import Defect, Record, collect

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
