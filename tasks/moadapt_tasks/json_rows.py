"""Files of rows: one JSON object a line, or all of them in one JSON list; told apart by their first character."""

import json
from codecs import BOM_UTF8
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from moadapt.task import BadExample, Defect
from moadapt_tasks.reading import read_json, read_list, require_file
from moadapt_tasks.records import Record, collect, make_record


def read_rows(file: Path) -> tuple[list[Record], list[BadExample]]:
    """Read the rows of a file, named by their lines, and every line that is no JSON object.

    Raises:
        ValueError: The file is missing, holds no row, or is something else.
    """
    require_file(file)
    if _first_byte(file) == b"[":
        listed = enumerate(read_list(file, read_json(file)))
        return collect(listed, lambda entry: make_record(file, None, "entry", *entry, None))
    rows, bad = collect(_lines(file), lambda line: _row(file, *line))
    if not rows:
        reason = f"none of its lines is usable, as {bad[0].entry}: {bad[0].reason}" if bad else "it is empty"
        raise ValueError(f"{file}: {reason}; give a file with one JSON object a line, or with a JSON list of them")
    return rows, bad


def _first_byte(file: Path) -> bytes:
    with file.open("rb") as opened:
        return opened.read(4096).removeprefix(BOM_UTF8).lstrip()[:1]


def _lines(file: Path) -> Iterator[tuple[int, bytes]]:
    with file.open("rb") as opened:
        for number, line in enumerate(opened, start=1):
            if line.strip():
                yield number, line


def _row(file: Path, number: int, line: bytes) -> Record:
    try:
        values: Any = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise Defect(BadExample(file, f"line {number}", f"it is no JSON: {error}")) from error
    if not isinstance(values, dict):
        raise Defect(BadExample(file, f"line {number}", f"it is {values!r:.60}; give a JSON object"))
    return Record(file, f"line {number}", values)
