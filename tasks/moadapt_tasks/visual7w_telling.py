"""Multiple-choice visual question answering in the form of Visual7W's telling questions.

One file for all splits, `{"images": [{image_id, filename, split, qa_pairs: [{qa_id, question, answer,
multiple_choices}]}]}`, where `multiple_choices` are three wrong answers. Zhu et al. 2016 (arXiv:1511.03416).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from pathlib import Path
from random import Random
from typing import ClassVar

from torchmetrics import Metric

from moadapt.registry import TASKS
from moadapt.task import BadExample, Example, Task
from moadapt_tasks.marked_splits import check_marks, entries_of
from moadapt_tasks.metrics import ChoiceAccuracy
from moadapt_tasks.options import LETTERS, check_options, lettered, meant
from moadapt_tasks.patterns import check_numbers, check_template, split_word
from moadapt_tasks.pictures import Pictures
from moadapt_tasks.reading import index, read_json, read_table
from moadapt_tasks.records import Record, collect


def _marks() -> dict[str, Sequence[str]]:
    return {"train": ("train",), "validation": ("val",), "test": ("test",)}


@TASKS.register("visual7w_telling")
@dataclass(frozen=True, kw_only=True)
class Visual7WTelling(Task):
    """Chooses among four answers to a question about a picture, by letter.

    The right answer stands at a place that depends on the question's identifier alone.

    Args:
        questions: The file of all splits, such as `visual7w/dataset_v7w_telling.json`.
        images: Pattern of the pictures, with `{filename}` or `{image_id}`, such as `visual7w/images/{filename}`.
        splits: The words that mark the entries of each of our splits.
        prompt: What to ask, with `{question}` and `{options}`.
        max_new_tokens: Longest answer to generate, in tokens.
        limit: Only the first so many usable rows of a split; later ones are not looked at.

    Raises:
        ValueError: A setting is out of range or a pattern mentions something else.
    """

    questions: str
    images: str
    splits: Mapping[str, Sequence[str]] = field(default_factory=_marks)
    prompt: str = "{question}\n{options}\nAnswer with the letter of an option."
    max_new_tokens: int = 8
    limit: int | None = None
    primary: ClassVar[str] = "accuracy"

    def __post_init__(self) -> None:
        """Check the settings."""
        check_marks(self.splits)
        check_numbers(self.max_new_tokens, self.limit)
        check_template("images", self.images, ["filename", "image_id"], ["filename", "image_id"])
        check_template("prompt", self.prompt, ["question", "options"], ["options"])

    def read(self, split: str) -> tuple[list[Example], list[BadExample]]:
        """Read one split; see `Task.read`."""
        file = Path(self.questions)
        table = read_table(file, read_json(file), "image_id", "images")
        images, bad = entries_of(table, split_word(self.splits, split))
        lists, worse = collect(images, lambda image: image.records("qa_pairs", "qa_id"))
        pairs = index(file, chain.from_iterable(lists), "qa_id")
        examples, worst = collect(pairs.rows.values(), partial(self._example, Pictures()), self.limit)
        return examples, bad + worse + pairs.bad + worst

    def parse(self, text: str, example: Example) -> str:
        """Return the letter of the option that the text means."""
        return meant(text, example.reference["options"])

    def metrics(self) -> dict[str, Metric]:
        """Return the share of right choices."""
        return {"accuracy": ChoiceAccuracy()}

    def _example(self, pictures: Pictures, pair: Record) -> Example:
        image = pair.within
        assert image is not None
        asked, right, wrong = pair.text("question"), pair.text("answer"), pair.texts("multiple_choices")
        place = Random(str(pair.identifier("qa_id"))).randrange(len(wrong) + 1)
        options = [*wrong[:place], right, *wrong[place:]]
        check_options(options, pair)
        values = {"filename": image.text("filename"), "image_id": image.identifier("image_id")}
        return Example(
            pictures=(pictures.find(self.images, image, **values),),
            prompt=self.prompt.format(question=asked, options=lettered(options)),
            answers=(LETTERS[place],),
            reference={"right": LETTERS[place], "options": options},
            entry=f"{pair.file}: {pair.entry}",
        )
