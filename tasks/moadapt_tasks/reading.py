"""Strict reading of JSON: every complaint names the file and the entry.

A file that cannot be read at all is a `ValueError`. What is wrong with one entry is a `Defect`, which carries the
`BadExample` that `collect` gathers, so that one pass over a file finds all its defects.
"""

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from reprlib import repr  # file contents in messages may be long
from typing import Any, TypeVar

from moadapt.task import BadExample

Identifier = int | str
Item = TypeVar("Item")
Made = TypeVar("Made")
_HUGE = 1e12


class Defect(Exception):
    """One entry cannot be used.

    Args:
        bad: File, entry and reason.
    """

    def __init__(self, bad: BadExample) -> None:
        super().__init__(str(bad))
        self.bad = bad


@dataclass(frozen=True)
class Record:
    """One JSON object and where it stands; its readers raise `Defect`.

    Args:
        file: The file that holds it.
        entry: Its name in messages.
        values: What it says.
        within: The object that holds it, if one does.
    """

    file: Path
    entry: str
    values: dict[str, Any]
    within: "Record | None" = None

    def wrong(self, reason: str) -> Defect:
        """Return the defect of this entry, to be raised."""
        return Defect(BadExample(self.file, self.entry, reason))

    def identifier(self, key: str) -> Identifier:
        """Return an integer or a text that is not empty."""
        found = self._get(key)
        if isinstance(found, bool) or not isinstance(found, int | str) or found == "":
            raise self.wrong(f"its {key} is {repr(found)}; give an integer or a text")
        return found

    def text(self, key: str) -> str:
        """Return a text without outer space; it may not be empty."""
        found = self._get(key)
        if not isinstance(found, str):
            raise self.wrong(f"its {key} is {repr(found)}; give a text")
        if not found.strip():
            raise self.wrong(f"its {key} is empty; write it or leave the entry out")
        return found.strip()

    def numbers(self, key: str, count: int) -> list[float]:
        """Return a list of so many finite numbers."""
        found = self._get(key)
        if not isinstance(found, list) or len(found) != count or not all(_is_number(number) for number in found):
            raise self.wrong(f"its {key} is {repr(found)}; give a list of {count} finite numbers")
        return [float(number) for number in found]

    def records(self, key: str, identity: str | None = None) -> "list[Record]":
        """Return a list of objects that is not empty.

        Args:
            key: Where the list stands.
            identity: The objects' identifier, which names them in messages; without it their position does.
        """
        found = self._get(key)
        if not isinstance(found, list) or not found:
            raise self.wrong(f"its {key} is {repr(found)}; give a list with at least one object")
        return [_record(self.file, self, key, i, values, identity) for i, values in enumerate(found)]

    def __contains__(self, key: str) -> bool:
        """Tell whether it says something under a key."""
        return self.values.get(key) is not None

    def _get(self, key: str) -> Any:
        if key not in self.values:
            raise self.wrong(f"it has no {key!r}; it has: {', '.join(sorted(self.values)) or 'nothing'}")
        return self.values[key]


@dataclass(frozen=True)
class Table:
    """Entries by identifier, in file order, and those that cannot be used.

    Args:
        file: The file that holds them.
        rows: The usable ones.
        bad: No objects, without identifier, or with one that an earlier entry has.
    """

    file: Path
    rows: dict[Identifier, Record]
    bad: list[BadExample]

    def find(self, key: str, asking: Record) -> Record:
        """Return the entry that another one points to.

        Args:
            key: Where the other holds the identifier.
            asking: The other; a defect is reported as its own.
        """
        wanted = asking.identifier(key)
        if wanted in self.rows:
            return self.rows[wanted]
        other: Identifier = str(wanted) if isinstance(wanted, int) else _as_integer(wanted)
        hint = f", which writes it {repr(other)}; use one type" if other in self.rows else ""
        raise asking.wrong(f"its {key} {repr(wanted)} is unknown to {self.file}{hint}")


def read_json(file: Path) -> Any:
    """Read a JSON file.

    Raises:
        ValueError: It is missing, or is no JSON; the message says where it breaks.
    """
    if not file.is_file():
        raise ValueError(f"{file} does not exist; give the path of a JSON file")
    try:
        return json.loads(file.read_bytes())
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is no JSON but binary; a pickle must be rewritten as JSON first") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"{file} is no JSON: {error.msg} in line {error.lineno}, column {error.colno}") from error


def read_list(file: Path, document: Any, under: str | None = None) -> list[Any]:
    """Return the entries of a document.

    Args:
        file: Where the document comes from.
        document: What `read_json` returned.
        under: Key of the list; without it the document itself is the list.

    Raises:
        ValueError: There is no list, or it is empty.
    """
    if under is None:
        found, place = document, "it"
    elif isinstance(document, dict) and under in document:
        found, place = document[under], f"its {under!r}"
    else:
        keys = f"has {', '.join(sorted(document)) or 'nothing'}" if isinstance(document, dict) else "is no object"
        raise ValueError(f"{file} lacks {under!r}: the document {keys}; give an object with a list under {under!r}")
    if not isinstance(found, list) or not found:
        kind = "an empty list" if found == [] else f"a {type(found).__name__}"
        raise ValueError(f"{file}: {place} is {kind}; give a list with at least one entry")
    return found


def read_table(file: Path, document: Any, identity: str, under: str | None = None) -> Table:
    """Read a document's list of objects into a table.

    Args:
        file: Where the document comes from.
        document: What `read_json` returned.
        identity: The objects' identifier.
        under: Key of the list; without it the document itself is the list.

    Raises:
        ValueError: There is no list, or it is empty.
    """
    entries = enumerate(read_list(file, document, under))
    records, bad = collect(entries, lambda entry: _record(file, None, under or "entry", *entry, identity))
    table = index(file, records, identity)
    return Table(file, table.rows, bad + table.bad)


def index(file: Path, records: Iterable[Record], identity: str) -> Table:
    """Index records of one file by their identifier; of two with the same one the first counts."""
    rows: dict[Identifier, Record] = {}

    def add(record: Record) -> None:
        name = record.identifier(identity)
        if name in rows:
            raise record.wrong(f"its {identity} {repr(name)} is that of an earlier entry; each needs its own")
        rows[name] = record

    return Table(file, rows, collect(records, add)[1])


def collect(
    items: Iterable[Item], make: Callable[[Item], Made], limit: int | None = None
) -> tuple[list[Made], list[BadExample]]:
    """Make something of each item, and gather the defects on the way, each once.

    Args:
        items: What to make it of.
        make: Makes one, or raises `Defect`.
        limit: Stop after so many were made.
    """
    made: list[Made] = []
    bad: dict[BadExample, None] = {}
    for item in items:
        if len(made) == limit:
            break
        try:
            made.append(make(item))
        except Defect as defect:
            bad[defect.bad] = None
    return made, list(bad)


def _record(file: Path, within: Record | None, key: str, position: int, values: Any, identity: str | None) -> Record:
    named = isinstance(values, dict) and identity is not None and identity in values
    label = f"{key} id" if identity == "id" else identity
    entry = f"{label} {repr(values[identity])}" if named else f"{key}[{position}]"
    if within is not None:
        entry = f"{within.entry}, {entry}"
    if not isinstance(values, dict):
        raise Defect(BadExample(file, entry, f"it is {repr(values)}; give a JSON object"))
    return Record(file, entry, values, within)


def _as_integer(text: str) -> Identifier:
    return int(text) if text.isdecimal() and len(text) < 20 else text


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < _HUGE  # so neither nan
