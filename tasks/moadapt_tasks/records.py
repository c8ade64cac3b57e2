"""JSON objects that know where they stand, read strictly.

What is wrong with one is a `Defect`, which carries the `BadExample` that `collect` gathers, so that one pass over a
file finds all its defects.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from reprlib import repr  # file contents in messages may be long
from typing import Any, TypeVar

from moadapt.task import BadExample, Defect

Identifier = int | str
Item = TypeVar("Item")
Made = TypeVar("Made")
_HUGE = 1e12
"""Above every number that belongs in such a file; what is below is neither infinite nor nan."""


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
        return self._identifier(key, self._get(key))

    def identifiers(self, key: str) -> list[Identifier]:
        """Return a list of identifiers, each once, maybe none; a single one stands for itself."""
        found = self._get(key)
        return list(
            dict.fromkeys(self._identifier(key, each) for each in (found if isinstance(found, list) else [found]))
        )

    def text(self, key: str) -> str:
        """Return a text without outer space; it may not be empty."""
        found = self._get(key)
        if not isinstance(found, str):
            raise self.wrong(f"its {key} is {repr(found)}; give a text")
        if not found.strip():
            raise self.wrong(f"its {key} is empty; write it or leave the entry out")
        return found.strip()

    def word(self, key: str) -> Identifier:
        """Return an integer, or a text that is not empty, without outer space: what a template can be filled with."""
        return self.text(key) if isinstance(self.values.get(key), str) else self.identifier(key)

    def texts(self, key: str, inner: str | None = None) -> list[str]:
        """Return a list of texts without outer space, none of them empty, that is not empty.

        Args:
            key: Where the list stands.
            inner: Where each of its items is an object: what holds the text in it.
        """
        items = self._items(key, "text" if inner is None else "object")
        return [self._text_of(key, i, item, inner) for i, item in enumerate(items)]

    def numbers(self, key: str, count: int) -> list[float]:
        """Return a list of so many finite numbers."""
        found = self._get(key)
        if not isinstance(found, list) or len(found) != count or not all(_is_number(number) for number in found):
            raise self.wrong(f"its {key} is {repr(found)}; give a list of {count} finite numbers")
        return [float(number) for number in found]

    def number(self, key: str) -> float:
        """Return a finite number."""
        found = self._get(key)
        if not _is_number(found):
            raise self.wrong(f"its {key} is {repr(found)}; give a finite number")
        return float(found)

    def flag(self, key: str) -> bool:
        """Return true or false."""
        found = self._get(key)
        if not isinstance(found, bool):
            raise self.wrong(f"its {key} is {repr(found)}; give true or false")
        return found

    def part(self, key: str) -> "Record":
        """Return an object that this one holds."""
        found = self._get(key)
        if not isinstance(found, dict):
            raise self.wrong(f"its {key} is {repr(found)}; give a JSON object")
        return Record(self.file, f"{self.entry}, {key}", found, self)

    def records(self, key: str, identity: str | None = None) -> "list[Record]":
        """Return a list of objects that is not empty.

        Args:
            key: Where the list stands.
            identity: The objects' identifier, which names them in messages; without it their position does.
        """
        found = self._items(key, "object")
        return [make_record(self.file, self, key, i, values, identity) for i, values in enumerate(found)]

    def __contains__(self, key: str) -> bool:
        """Tell whether it says something under a key."""
        return self.values.get(key) is not None

    def _items(self, key: str, kind: str) -> list[Any]:
        found = self._get(key)
        if not isinstance(found, list) or not found:
            raise self.wrong(f"its {key} is {repr(found)}; give a list with at least one {kind}")
        return found

    def _text_of(self, key: str, position: int, item: Any, inner: str | None) -> str:
        """Return the text of one item; a record of it is made only to tell what is wrong, as files hold millions."""
        found = item if inner is None else item.get(inner) if isinstance(item, dict) else None
        if isinstance(found, str) and (text := found.strip()):
            return text
        if inner is None:
            return Record(self.file, f"{self.entry}, {key}[{position}]", {"text": item}, self).text("text")
        return make_record(self.file, self, key, position, item, None).text(inner)

    def _identifier(self, key: str, found: Any) -> Identifier:
        if isinstance(found, bool) or not isinstance(found, int | str) or found == "":
            raise self.wrong(f"its {key} is {repr(found)}; give an integer or a text")
        return found

    def _get(self, key: str) -> Any:
        if key not in self.values:
            raise self.wrong(f"it has no {key!r}; it has: {', '.join(sorted(self.values)) or 'nothing'}")
        return self.values[key]


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


def make_record(
    file: Path, within: Record | None, key: str, position: int, values: Any, identity: str | None
) -> Record:
    """Make a record of an item of a list.

    Args:
        file: The file that holds it.
        within: The object that holds the list, if one does.
        key: What the list is called.
        position: Its place in the list, from 0.
        values: The item.
        identity: The objects' identifier, which names them in messages; without it their place does.

    Raises:
        Defect: The item is no JSON object.
    """
    named = isinstance(values, dict) and identity is not None and identity in values
    label = f"{key} id" if identity == "id" else identity
    entry = f"{label} {repr(values[identity])}" if named else f"{key}[{position}]"
    if within is not None:
        entry = f"{within.entry}, {entry}"
    if not isinstance(values, dict):
        raise Defect(BadExample(file, entry, f"it is {repr(values)}; give a JSON object"))
    return Record(file, entry, values, within)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < _HUGE
