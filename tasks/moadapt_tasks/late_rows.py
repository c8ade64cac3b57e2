"""Rows that stay where they lie until they are drawn."""

from abc import abstractmethod
from collections.abc import Sequence
from typing import overload

from moadapt.task import Example


class LateRows(Sequence[Example]):
    """The rows of a split, each read when it is asked for.

    Args:
        count: How many there are.
        limit: Only the first so many; None for all.
    """

    def __init__(self, count: int, limit: int | None) -> None:
        self._count = count if limit is None else min(count, limit)

    @abstractmethod
    def at(self, row: int) -> Example:
        """Read one row.

        Args:
            row: From 0.

        Raises:
            Defect: It cannot be used.
        """

    def __len__(self) -> int:
        """Return how many rows there are."""
        return self._count

    @overload
    def __getitem__(self, row: int) -> Example: ...
    @overload
    def __getitem__(self, row: slice) -> Sequence[Example]: ...
    def __getitem__(self, row: int | slice) -> Example | Sequence[Example]:
        """Read a row, or several, counted from either end."""
        numbers = range(len(self))[row]
        return self.at(numbers) if isinstance(numbers, int) else [self.at(each) for each in numbers]
