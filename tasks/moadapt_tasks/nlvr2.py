"""Statements about pairs of pictures, in the NLVR2 format.

One file a split with an object a line, `{identifier, sentence, label, left_url, right_url}`, for training also
`directory`. The pictures of the statement `dev-850-0-1` are `dev-850-0-img0` and `dev-850-0-img1`, left and right. Suhr
et al. 2019 (arXiv:1811.00491).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import ClassVar

from torchmetrics import Metric

from moadapt.registry import TASKS
from moadapt.task import BadExample, Example, Task
from moadapt_tasks.json_rows import read_rows
from moadapt_tasks.metrics import NLVR2Scores
from moadapt_tasks.patterns import check_numbers, check_splits, check_template, own_words, split_word
from moadapt_tasks.pictures import Pictures
from moadapt_tasks.reading import index
from moadapt_tasks.records import Record, collect


@TASKS.register("nlvr2")
@dataclass(frozen=True, kw_only=True)
class NLVR2(Task):
    """Tells whether a sentence is true of two pictures.

    Args:
        statements: Pattern of the files, with `{split}`, such as `nlvr2/data/{split}.json`.
        images: Pattern of the pictures, with `{name}`, maybe `{split}`, and maybe `{directory}`, which is empty where
            an entry has none: `nlvr2/images/{split}/{directory}/{name}.png`.
        splits: The word that stands for each of our splits in the patterns, such as `test: test1`.
        prompt: What to ask, with `{sentence}`.
        true_word: What to answer where the sentence is true.
        false_word: What to answer where it is false.
        max_new_tokens: Longest answer to generate, in tokens.
        limit: Only the first so many usable rows of a split; later ones are not looked at.

    Raises:
        ValueError: A setting is out of range, a pattern mentions something else, or the answers are no two words.
    """

    statements: str
    images: str
    splits: Mapping[str, str] = field(default_factory=own_words)
    prompt: str = "{sentence} True or false?"
    true_word: str = "true"
    false_word: str = "false"
    max_new_tokens: int = 4
    limit: int | None = None
    primary: ClassVar[str] = "accuracy"

    def __post_init__(self) -> None:
        """Check the settings."""
        check_splits(self.splits)
        check_numbers(self.max_new_tokens, self.limit)
        check_template("statements", self.statements, ["split"])
        check_template("images", self.images, ["split", "directory", "name"], ["name"])
        check_template("prompt", self.prompt, ["sentence"], ["sentence"])
        words = [_first_word(word) for word in (self.true_word, self.false_word)]
        if "" in words or words[0] == words[1]:
            given = f"{self.true_word!r} and {self.false_word!r}"
            raise ValueError(f"`true_word` and `false_word` are {given}; give two different words")

    def read(self, split: str) -> tuple[list[Example], list[BadExample]]:
        """Read one split; see `Task.read`."""
        word = split_word(self.splits, split)
        file = Path(self.statements.format(split=word))
        rows, unreadable = read_rows(file)
        table = index(file, rows, "identifier")
        examples, bad = collect(table.rows.values(), partial(self._example, word, Pictures()), self.limit)
        return examples, unreadable + table.bad + bad

    def parse(self, text: str, example: Example) -> str:
        """Return `true` or `false` where the text begins with the word for it, else the text."""
        meanings = {_first_word(self.true_word): "true", _first_word(self.false_word): "false"}
        return meanings.get(_first_word(text), text.strip())

    def metrics(self) -> dict[str, Metric]:
        """Return accuracy and consistency of the published evaluation."""
        return {"nlvr2": NLVR2Scores()}

    def _example(self, word: str, pictures: Pictures, row: Record) -> Example:
        sentence, identifier, label = row.text("sentence"), row.text("identifier"), row.text("label").lower()
        pair, _, last = identifier.rpartition("-")
        if pair.count("-") < 2 or not last:
            raise row.wrong(f"its identifier is {identifier!r}; give split-set-pair-sentence, such as dev-850-0-1")
        if label not in ("true", "false"):
            raise row.wrong(f"its label is {row.values['label']!r}; give True or False")
        directory = row.identifier("directory") if "directory" in row else ""
        find = partial(pictures.find, self.images, row, split=word, directory=directory)
        return Example(
            pictures=(find(name=f"{pair}-img0"), find(name=f"{pair}-img1")),
            prompt=self.prompt.format(sentence=sentence),
            answers=(self.true_word if label == "true" else self.false_word,),
            reference={"identifier": identifier, "label": label},
            entry=f"{row.file}: {row.entry}",
        )


def _first_word(text: str) -> str:
    return next(iter(text.lower().split()), "").strip(".,;:!\"'")
