"""What a task is: data, prompt, answer parsing and metrics behind one interface.

A task is a spec: a frozen dataclass that YAML binds and JSON stores. It reads public files into examples, turns
generated text back into a prediction, and says which metrics compare predictions with references.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from torchmetrics import Metric

from moadapt.picture import Picture

SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class Example:
    """One row of a task.

    Args:
        pictures: What it shows, in the order in which it is shown; none for a row of text alone.
        prompt: Text the model is asked with, without image placeholder or chat template.
        answers: Texts that are right; training draws one of them a pass.
        reference: What the task's metrics compare a prediction with.
        entry: Where it comes from, file and entry, for messages.
    """

    pictures: tuple[Picture, ...]
    prompt: str
    answers: tuple[str, ...]
    reference: Any
    entry: str

    @property
    def files(self) -> list[str]:
        """Names of its pictures' files."""
        return [str(picture.file) for picture in self.pictures]


@dataclass(frozen=True)
class BadExample:
    """One entry of a file that cannot be used.

    Args:
        file: The file that holds it.
        entry: Which entry, such as `question_id 17`.
        reason: What is wrong with it and what is accepted.
    """

    file: Path
    entry: str
    reason: str

    def __str__(self) -> str:
        """Say file, entry and reason in one line."""
        return f"{self.file}: {self.entry}: {self.reason}"


class Defect(Exception):
    """One entry cannot be used.

    Args:
        bad: File, entry and reason.
    """

    def __init__(self, bad: BadExample) -> None:
        super().__init__(str(bad))
        self.bad = bad


class Task(ABC):
    """Data, prompt, answer parsing and metrics of one task."""

    primary: ClassVar[str]
    """The score that stands for the task where one number is wanted."""
    max_new_tokens: int
    """Longest answer to generate, in tokens."""

    @abstractmethod
    def read(self, split: str) -> tuple[Sequence[Example], list[BadExample]]:
        """Read one split.

        Args:
            split: `train`, `validation` or `test`.

        Returns:
            The examples in file order, and every entry that cannot be used. Where a split is too large to be held, the
            sequence reads each example when it is asked for, and raises `Defect` for one that cannot be used; worker
            processes get a copy of it.

        Raises:
            ValueError: A file is missing, is no JSON or lacks a key that every entry needs.
        """

    @abstractmethod
    def parse(self, text: str, example: Example) -> Any:
        """Turn generated text into a prediction that the metrics accept.

        Args:
            text: What the model wrote, without special tokens.
            example: The row it was asked.
        """

    @abstractmethod
    def metrics(self) -> dict[str, Metric]:
        """Return fresh metrics; each takes `update(predictions, references)`, one entry a row.

        A metric whose `compute` returns a dict contributes that dict's scores under its own keys.
        """


class Dataset(ABC):
    """Data that can make or fetch itself and knows its tasks."""

    @abstractmethod
    def prepare(self) -> Mapping[str, Task]:
        """Write the files where they are not there yet and return the tasks that read them, by name."""
