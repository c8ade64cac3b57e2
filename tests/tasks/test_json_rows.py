import json
from pathlib import Path

import pytest

from moadapt_tasks.json_rows import read_rows


def test_read_rows_names_rows_by_their_lines(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_bytes('\ufeff{"a": "é\u2028"}\r\n\n  {"a": 2}'.encode())
    rows, bad = read_rows(file)
    assert [(row.entry, row.values) for row in rows] == [("line 1", {"a": "é\u2028"}), ("line 3", {"a": 2})]
    assert bad == []


def test_read_rows_takes_a_json_list(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text("\n" + json.dumps([{"a": 1}, 2, {"a": 3}], indent=2))
    rows, bad = read_rows(file)
    assert [(row.entry, row.values) for row in rows] == [("entry[0]", {"a": 1}), ("entry[2]", {"a": 3})]
    assert [(one.entry, one.reason) for one in bad] == [("entry[1]", "it is 2; give a JSON object")]


def test_read_rows_reports_every_broken_line(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_bytes(b'{"a": 1}\n{"a": 2\n{"a": 3}\n[4]\n"\xff"\n' + b"[" * 100_000)
    rows, bad = read_rows(file)
    assert [row.values["a"] for row in rows] == [1, 3]
    assert [one.entry for one in bad] == ["line 2", "line 4", "line 5", "line 6"]
    assert bad[0].reason.startswith("it is no JSON: ")
    assert bad[1].reason == "it is [4]; give a JSON object"


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"", "it is empty; give a file with one JSON object a line"),
        (b"\n \n", "it is empty"),
        (b'{\n "a": 1\n}\n', r"none of its lines is usable, as line 1: it is no JSON"),
        (b"\x80\x04\x95pickle", "none of its lines is usable, as line 1"),
        (b"[]", "it is an empty list"),
        (b"[1,", "is no JSON"),
    ],
)
def test_read_rows_refuses_a_file_without_rows(tmp_path: Path, content: bytes, complaint: str) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=rf"rows\.jsonl.*{complaint}"):
        read_rows(file)


def test_read_rows_says_which_file_is_missing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"gone\.jsonl does not exist"):
        read_rows(tmp_path / "gone.jsonl")
