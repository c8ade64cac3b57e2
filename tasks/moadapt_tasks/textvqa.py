"""Visual question answering in the TextVQA format.

One file a split: `{"data": [{question_id, image_id, question, answers: [text]}]}`; ten people answer each question. Its
test split is published without answers. Singh et al. 2019 (arXiv:1904.08920).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import ClassVar

from torchmetrics import Metric

from moadapt.registry import TASKS
from moadapt.task import BadExample, Example, Task
from moadapt_tasks.human_answers import TrainAnswers, check_train_answers, taught
from moadapt_tasks.metrics import VQAAccuracy
from moadapt_tasks.patterns import check_numbers, check_splits, check_template, own_words, split_word
from moadapt_tasks.pictures import Pictures
from moadapt_tasks.reading import read_json, read_table
from moadapt_tasks.records import Record, collect


@TASKS.register("textvqa")
@dataclass(frozen=True, kw_only=True)
class TextVQA(Task):
    """Answers questions about the text in pictures.

    Args:
        questions: Pattern of the files, with `{split}`, such as `textvqa/TextVQA_0.5.1_{split}.json`.
        images: Pattern of the pictures, with `{image_id}` and maybe `{split}`, such as
            `textvqa/train_images/{image_id}.jpg`, which holds those of train and val.
        splits: The word that stands for each of our splits in the patterns, such as `validation: val`.
        prompt: What to ask, with `{question}`.
        train_answers: Train on the answer that most people gave, or on all, each time another.
        max_new_tokens: Longest answer to generate, in tokens.
        limit: Only the first so many usable rows of a split; later ones are not looked at.

    Raises:
        ValueError: A setting is out of range or a pattern mentions something else.
    """

    questions: str
    images: str
    splits: Mapping[str, str] = field(default_factory=own_words)
    prompt: str = "{question}"
    train_answers: TrainAnswers = "most_common"
    max_new_tokens: int = 16
    limit: int | None = None
    primary: ClassVar[str] = "accuracy"

    def __post_init__(self) -> None:
        """Check the settings."""
        check_splits(self.splits)
        check_numbers(self.max_new_tokens, self.limit)
        check_template("questions", self.questions, ["split"])
        check_template("images", self.images, ["split", "image_id"], ["image_id"])
        check_template("prompt", self.prompt, ["question"], ["question"])
        check_train_answers(self.train_answers)

    def read(self, split: str) -> tuple[list[Example], list[BadExample]]:
        """Read one split; see `Task.read`."""
        word = split_word(self.splits, split)
        file = Path(self.questions.format(split=word))
        table = read_table(file, read_json(file), "question_id", "data")
        examples, bad = collect(table.rows.values(), partial(self._example, word, Pictures()), self.limit)
        return examples, table.bad + bad

    def parse(self, text: str, example: Example) -> str:
        """Return the text without outer space."""
        return text.strip()

    def metrics(self) -> dict[str, Metric]:
        """Return the official VQA accuracy."""
        return {"accuracy": VQAAccuracy()}

    def _example(self, word: str, pictures: Pictures, question: Record) -> Example:
        asked, answers = question.text("question"), question.texts("answers")
        picture = pictures.find(self.images, question, split=word, image_id=question.identifier("image_id"))
        return Example(
            pictures=(picture,),
            prompt=self.prompt.format(question=asked),
            answers=taught(answers, self.train_answers),
            reference=answers,
            entry=f"{question.file}: {question.entry}",
        )
