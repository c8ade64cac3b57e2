"""Strict reading of JSON files into tables; what cannot be read at all is a `ValueError` that names the file."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from reprlib import repr  # file contents in messages may be long
from typing import Any

from moadapt.task import BadExample, Defect
from moadapt_tasks.records import Identifier, Record, collect, make_record


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
        return self._row(asking.identifier(key), key, asking)

    def find_all(self, key: str, asking: Record) -> list[Record]:
        """Return the entries that another one points to, by one identifier or a list of any number.

        Args:
            key: Where the other holds the identifiers.
            asking: The other; a defect is reported as its own.
        """
        return [self._row(wanted, key, asking) for wanted in asking.identifiers(key)]

    def _row(self, wanted: Identifier, key: str, asking: Record) -> Record:
        if wanted in self.rows:
            return self.rows[wanted]
        other: Identifier = str(wanted) if isinstance(wanted, int) else _as_integer(wanted)
        hint = f", which writes it {repr(other)}; use one type" if other in self.rows else ""
        raise asking.wrong(f"its {key} {repr(wanted)} is unknown to {self.file}{hint}")


def require_file(file: Path) -> None:
    """Require that a file is there.

    Raises:
        ValueError: It is missing or a folder.
    """
    if not file.is_file():
        what = "is a folder" if file.is_dir() else "does not exist"
        raise ValueError(f"{file} {what}; give the path of a JSON file")


def read_json(file: Path) -> Any:
    """Read a JSON file.

    Raises:
        ValueError: It is missing, or is no JSON; the message says where it breaks.
    """
    require_file(file)
    try:
        return json.loads(file.read_bytes())
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is no JSON but binary; a pickle must be rewritten as JSON first") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"{file} is no JSON: {error.msg} in line {error.lineno}, column {error.colno}") from error
    except ValueError as error:  # an integer of more digits than Python reads
        raise ValueError(f"{file} cannot be read: {error}") from error
    except RecursionError as error:
        raise ValueError(f"{file} is nested too deeply; give a JSON file in the form that the task reads") from error


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
    records, bad = collect(entries, lambda entry: make_record(file, None, under or "entry", *entry, identity))
    table = index(file, records, identity)
    return Table(file, table.rows, bad + table.bad)


def read_mapping(file: Path, document: Any, kind: str) -> Table:
    """Read a document whose keys are the identifiers of its objects.

    Args:
        file: Where the document comes from.
        document: What `read_json` returned.
        kind: What an object is called in messages.

    Raises:
        ValueError: It is no object, or an empty one.
    """
    if not isinstance(document, dict) or not document:
        what = "an empty object" if document == {} else f"a {type(document).__name__}"
        raise ValueError(f"{file}: it is {what}; give an object with one {kind} under each identifier")
    made, bad = collect(document.items(), lambda entry: (entry[0], _named(file, kind, *entry)))
    return Table(file, dict(made), bad)


def join_tables(place: Path, tables: Sequence[Table]) -> Table:
    """Return the entries of all tables; of two with the same identifier the first counts.

    Args:
        place: What holds them.
        tables: The tables, at least one.
    """
    rows = dict(tables[0].rows)

    def add(entry: tuple[Identifier, Record]) -> None:
        name, record = entry
        if name in rows:
            raise record.wrong(f"{rows[name].file} has an entry of the same name; each needs its own")
        rows[name] = record

    repeated = collect(chain.from_iterable(table.rows.items() for table in tables[1:]), add)[1]
    return Table(place, rows, [bad for table in tables for bad in table.bad] + repeated)


def index(file: Path, records: Iterable[Record], identity: str) -> Table:
    """Index records of one file by their identifier; of two with the same one the first counts."""
    rows: dict[Identifier, Record] = {}

    def add(record: Record) -> None:
        name = record.identifier(identity)
        if name in rows:
            raise record.wrong(f"its {identity} {repr(name)} is that of an earlier entry; each needs its own")
        rows[name] = record

    return Table(file, rows, collect(records, add)[1])


def _named(file: Path, kind: str, name: str, values: Any) -> Record:
    if not isinstance(values, dict):
        raise Defect(BadExample(file, f"{kind} {repr(name)}", f"it is {repr(values)}; give a JSON object"))
    return Record(file, f"{kind} {repr(name)}", values)


def _as_integer(text: str) -> Identifier:
    return int(text) if text.isdecimal() and len(text) < 20 else text
