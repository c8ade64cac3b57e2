"""Rows of one's own: a JSON object a line, whose fields the settings name.

`{"image": "a.jpg", "question": "what is it?", "answer": "a cat"}`; a row may show any number of pictures, or none, and
have several right answers. A JSON list of such objects is read as well.
"""

from dataclasses import dataclass
from functools import partial
from pathlib import Path

from moadapt.registry import TASKS
from moadapt.task import BadExample, Example
from moadapt_tasks.json_rows import read_rows
from moadapt_tasks.own_rows import OwnRows
from moadapt_tasks.patterns import check_template, split_word
from moadapt_tasks.pictures import Pictures
from moadapt_tasks.records import collect


@TASKS.register("jsonl")
@dataclass(frozen=True, kw_only=True)
class JSONLines(OwnRows):
    """Answers whatever a file of rows asks; its settings name the rows' fields.

    Args:
        rows: Pattern of the files, with `{split}`.

    Raises:
        ValueError: A setting is out of range, a pattern is none, or the metric has no such score.
    """

    rows: str

    def __post_init__(self) -> None:
        """Check the settings."""
        super().__post_init__()
        check_template("rows", self.rows, ["split"])

    def read(self, split: str) -> tuple[list[Example], list[BadExample]]:
        """Read one split; see `Task.read`."""
        word = split_word(self.splits, split)
        rows, bad = read_rows(Path(self.rows.format(split=word)))
        examples, worse = collect(rows, partial(self.example, word, Pictures()), self.limit)
        return examples, bad + worse
