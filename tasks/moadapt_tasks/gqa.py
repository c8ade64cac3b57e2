"""Visual question answering in the GQA format.

A questions file a split, `{question_id: {imageId, question, answer, types: {structural, semantic, detailed}, entailed,
groups: {global}, isBalanced}}`, or a folder of such files, as `train_all_questions` is one; and, for validity and
plausibility, a choices file `{question_id: {valid, plausible}}` from the evaluation's archive. Hudson and Manning 2019
(arXiv:1902.09506).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from torchmetrics import Metric

from moadapt.registry import TASKS
from moadapt.task import BadExample, Example, Task
from moadapt_tasks.metrics import GQAScores
from moadapt_tasks.patterns import check_numbers, check_splits, check_template, own_words, split_word
from moadapt_tasks.pictures import Pictures
from moadapt_tasks.reading import Table, join_tables, read_json, read_mapping
from moadapt_tasks.records import Record, collect


@TASKS.register("gqa")
@dataclass(frozen=True, kw_only=True)
class GQA(Task):
    """Answers questions that take reasoning over several things in a picture.

    Scores are those of `GQAScores`; consistency needs the entailed questions too, which the `all` files hold.

    Args:
        questions: Pattern of the questions files, or of folders of them, with `{split}`, such as
            `gqa/{split}_balanced_questions.json`.
        images: Pattern of the pictures, with `{image_id}` and maybe `{split}`, such as `gqa/images/{image_id}.jpg`.
        choices: Pattern of the choices files, with `{split}`, such as `gqa/eval/{split}_choices.json`; they are not
            read for training.
        splits: The word that stands for each of our splits in the patterns, such as `validation: val`.
        prompt: What to ask, with `{question}`.
        max_new_tokens: Longest answer to generate, in tokens.
        limit: Only the first so many usable rows of a split; later ones are not looked at.

    Raises:
        ValueError: A setting is out of range or a pattern mentions something else.
    """

    questions: str
    images: str
    choices: str | None = None
    splits: Mapping[str, str] = field(default_factory=own_words)
    prompt: str = "{question}"
    max_new_tokens: int = 8
    limit: int | None = None
    primary: ClassVar[str] = "accuracy"

    def __post_init__(self) -> None:
        """Check the settings."""
        check_splits(self.splits)
        check_numbers(self.max_new_tokens, self.limit)
        check_template("questions", self.questions, ["split"])
        check_template("choices", self.choices or "", ["split"])
        check_template("images", self.images, ["split", "image_id"], ["image_id"])
        check_template("prompt", self.prompt, ["question"], ["question"])

    def read(self, split: str) -> tuple[list[Example], list[BadExample]]:
        """Read one split; see `Task.read`."""
        word = split_word(self.splits, split)
        questions = _read(Path(self.questions.format(split=word)))
        judged = self.choices is not None and split != "train"
        choices = _read(Path((self.choices or "").format(split=word))) if judged else None
        make = partial(self._example, word, choices, Pictures())
        examples, bad = collect(questions.rows.items(), make, self.limit)
        return examples, questions.bad + (choices.bad if choices else []) + bad

    def parse(self, text: str, example: Example) -> str:
        """Return the text in lower case without outer space and full stop."""
        return text.lower().strip().rstrip(". ")

    def metrics(self) -> dict[str, Metric]:
        """Return the scores of the published evaluation."""
        return {"gqa": GQAScores()}

    def _example(
        self, word: str, choices: Table | None, pictures: Pictures, named: tuple[str | int, Record]
    ) -> Example:
        name, question = named
        asked, answer = question.text("question"), question.text("answer")
        picture = pictures.find(self.images, question, split=word, image_id=question.identifier("imageId"))
        return Example(
            pictures=(picture,),
            prompt=self.prompt.format(question=asked),
            answers=(answer,),
            reference={"id": str(name), "answer": answer} | _kind(question) | _possible(str(name), question, choices),
            entry=f"{question.file}: {question.entry}",
        )


def _kind(question: Record) -> dict[str, Any]:
    """Return what a question's file tells of it for scores."""
    types = question.part("types")
    known: dict[str, Any] = {key: types.text(key) for key in ("structural", "semantic")}
    if "detailed" in types:
        known["detailed"] = types.text("detailed")
    if "isBalanced" in question:
        known["balanced"] = question.flag("isBalanced")
    if "groups" in question and "global" in (groups := question.part("groups")):
        known["group"] = groups.text("global")
    if question.values.get("entailed"):
        known["entailed"] = question.texts("entailed")
    return known


def _possible(name: str, question: Record, choices: Table | None) -> dict[str, list[str]]:
    """Return a question's valid and plausible answers, where they are to be known."""
    if choices is None:
        return {}
    if name not in choices.rows:
        raise question.wrong(f"{choices.file} has no choices for it; add them or give the choices of these questions")
    return {key: choices.rows[name].texts(key) for key in ("valid", "plausible")}


def _read(place: Path) -> Table:
    files = sorted(place.glob("*.json")) if place.is_dir() else [place]
    if not files:
        raise ValueError(f"{place} is a folder without JSON files; give the questions of a split")
    return join_tables(place, [read_mapping(file, read_json(file), "question") for file in files])
