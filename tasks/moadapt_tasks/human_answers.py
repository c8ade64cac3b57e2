"""Questions that several people answered each, and which of the answers a model is taught."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import ClassVar, Literal

from torchmetrics import Metric

from moadapt.picture import Picture
from moadapt.task import Example, Task
from moadapt_tasks.metrics import VQAAccuracy
from moadapt_tasks.metrics.vqa_answers import normalise_answer, strip_answer
from moadapt_tasks.patterns import check_numbers, check_splits, check_template, own_words
from moadapt_tasks.records import Record

TrainAnswers = Literal["most_common", "all"]


@dataclass(frozen=True, kw_only=True)
class HumanAnswers(Task):
    """What tasks share whose questions several people answered: settings, training answers, the official accuracy.

    Args:
        questions: Pattern of the questions files, with `{split}`.
        images: Pattern of the pictures, with the field that names one and maybe `{split}`.
        splits: The word that stands for each of our splits in the patterns.
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
    names_picture: ClassVar[str] = "image_id"
    """The field that `images` must mention."""

    def __post_init__(self) -> None:
        """Check the settings."""
        check_splits(self.splits)
        check_numbers(self.max_new_tokens, self.limit)
        check_template("questions", self.questions, ["split"])
        check_template("images", self.images, ["split", self.names_picture], [self.names_picture])
        check_template("prompt", self.prompt, ["question"], ["question"])
        check_train_answers(self.train_answers)

    def parse(self, text: str, example: Example) -> str:
        """Return the text without outer space."""
        return text.strip()

    def metrics(self) -> dict[str, Metric]:
        """Return the official VQA accuracy."""
        return {"accuracy": VQAAccuracy()}

    def row(self, question: Record, picture: Picture, answers: list[str], named: str | None = None) -> Example:
        """Return a question as a row.

        Args:
            question: With its `question`.
            picture: What it is about.
            answers: What each person answered, at least one.
            named: What the file calls the most common one, if it does.
        """
        return Example(
            pictures=(picture,),
            prompt=self.prompt.format(question=question.text("question")),
            answers=taught(answers, self.train_answers, named),
            reference=answers,
            entry=f"{question.file}: {question.entry}",
        )


def check_train_answers(chosen: TrainAnswers) -> None:
    """Require one of the two.

    Raises:
        ValueError: It is something else.
    """
    if chosen not in ("most_common", "all"):
        raise ValueError(f"`train_answers` is {chosen!r}; give most_common or all")


def taught(answers: Sequence[str], chosen: TrainAnswers, named: str | None = None) -> tuple[str, ...]:
    """Return the answers to train on.

    Args:
        answers: What each person answered, at least one.
        chosen: Only the most common one, or all, each time another.
        named: What the file calls the most common one, if it does.
    """
    return tuple(answers) if chosen == "all" else (most_common(answers, named),)


def most_common(answers: Sequence[str], named: str | None = None) -> str:
    """Return the answer that most people gave, counted as the accuracy compares them.

    Args:
        answers: What each person answered, at least one.
        named: What the file calls the most common one; it settles ties and spelling, but some files fill it otherwise.
    """
    spellings = [_spelling(answer) for answer in answers]
    counts = Counter(spellings)
    most = max(counts.values())
    if named is not None and counts[_spelling(named)] == most:
        return named
    chosen = next(spelling for spelling in spellings if counts[spelling] == most)
    return Counter(a for a, spelling in zip(answers, spellings, strict=True) if spelling == chosen).most_common(1)[0][0]


@lru_cache(maxsize=2**16)  # people repeat each other
def _spelling(answer: str) -> str:
    return normalise_answer(strip_answer(answer))
