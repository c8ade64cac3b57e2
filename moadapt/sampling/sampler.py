"""The sampler interface: a spec that says which share of the training rows each task gets.

A sampler holds no state and draws no random numbers. What it says may change from step to step, and with what
validations find; what it has to remember of these is a plain value that the place in the data carries, and with it the
checkpoint. So all processes agree without a word, and a resumed run goes on as the one that was not stopped.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

Known = Mapping[str, Mapping[str, float]]
"""What a sampler remembers of validations: numbers of tasks by their names, under names of its own."""


@dataclass(frozen=True, kw_only=True)
class Sampler(ABC):
    """What a user writes to choose the tasks' shares: a value bound by YAML."""

    in_order: ClassVar[bool] = False
    """Whether tasks take turns in the order in which they are given, a turn being one turn however many rows it has.

    Else they start at random moments, and a turn of many rows is followed by a long wait, so that shares are of rows.
    """

    @property
    def reads(self) -> Literal["loss", "score"] | None:
        """What it asks of every validation; None where it follows none."""
        return None

    @abstractmethod
    def shares(self, sizes: Mapping[str, int], step: int, known: Known) -> Mapping[str, float]:
        """Return the share of each task in the rows that are drawn now, by name; only their ratios matter.

        Args:
            sizes: Rows of each task, at least 1.
            step: How many batches came before.
            known: What `follow` gave last; empty before the first validation.
        """

    def follow(self, known: Known, found: Mapping[str, float]) -> Known:
        """Return what to remember after a validation.

        Args:
            known: What was remembered before; empty at first.
            found: What `reads` asked for, by task; tasks without validation rows are left out.
        """
        raise NotImplementedError(f"{type(self).__name__} reads no validation")
