"""Rows of one's own, whatever file holds them: settings name the fields that make a prompt, answers and pictures."""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torchmetrics import Metric

from moadapt.picture import Picture
from moadapt.registry import TEXT_METRICS
from moadapt.task import BadExample, Example, Task
from moadapt_tasks.human_answers import TrainAnswers, check_train_answers, taught
from moadapt_tasks.patterns import check_numbers, check_own_template, check_splits, own_words, template_fields
from moadapt_tasks.pictures import Pictures, StoredPicture
from moadapt_tasks.records import Identifier, Record


@dataclass(frozen=True, kw_only=True)
class OwnRows(Task):
    """Answers whatever rows ask; its settings name the rows' fields.

    Args:
        images: Patterns of the pictures that a row shows, in that order, with fields of the row and maybe `{split}`,
            such as `photos/{image}` or `nlvr/dev/dev-{identifier}-0.png`. A field that holds a list stands for a
            picture of each of its items; one that is null or an empty list for none. A field that holds a picture
            itself, in an archive or a table, stands alone: `{jpg}`.
        prompt: What to ask, with fields of the row.
        answers: The field that holds the right answer, or a list of right ones.
        metric: What compares predicted texts with the right ones: a short name of `moadapt list metrics`, a dotted
            path, or `file.py:Class`.
        score: Which of the metric's scores stands for the task; needed where it has several.
        splits: The word that stands for each of our splits in the patterns, such as `validation: val`.
        train_answers: Train on all right answers, each time another, or on the one that most people gave.
        max_new_tokens: Longest answer to generate, in tokens.
        limit: Only the first so many rows of a split.

    Raises:
        ValueError: A setting is out of range, a pattern is none, or the metric has no such score.
    """

    images: Sequence[str] = ()
    prompt: str = "{question}"
    answers: str = "answer"
    metric: str = "vqa_accuracy"
    score: str | None = None
    splits: Mapping[str, str] = field(default_factory=own_words)
    train_answers: TrainAnswers = "all"
    max_new_tokens: int = 64
    limit: int | None = None

    def __post_init__(self) -> None:
        """Check the settings."""
        check_splits(self.splits)
        check_numbers(self.max_new_tokens, self.limit)
        check_own_template("prompt", self.prompt)
        if isinstance(self.images, str):
            raise ValueError(f"`images` is {self.images!r}; give a list of patterns, one for each picture")
        for pattern in self.images:
            check_own_template("images", pattern)
        check_train_answers(self.train_answers)
        scores = _scores_of(self.metric)
        if self.primary not in scores:
            raise ValueError(f"`score` is {self.score!r}; metric {self.metric!r} has {', '.join(scores)}")

    @property
    def primary(self) -> str:  # type: ignore[override]
        """The score that stands for the task."""
        return self.metric if self.score is None else self.score

    @abstractmethod
    def read(self, split: str) -> tuple[Sequence[Example], list[BadExample]]:
        """Read one split; see `Task.read`."""

    def parse(self, text: str, example: Example) -> str:
        """Return the text without outer space."""
        return text.strip()

    def metrics(self) -> dict[str, Metric]:
        """Return the metric that was chosen."""
        return {self.metric: TEXT_METRICS.get(self.metric)()}

    def example(self, word: str, pictures: Pictures, row: Record) -> Example:
        """Return what a row says.

        Args:
            word: What stands for the split in patterns.
            pictures: Looks at pictures that are files.
            row: The row.

        Raises:
            Defect: It cannot be used.
        """
        prompt = self.prompt.format(**{name: row.word(name) for name in template_fields(self.prompt)})
        several = isinstance(row.values.get(self.answers), list)
        answers = row.texts(self.answers) if several else [row.text(self.answers)]
        shown = [found for pattern in self.images for found in _found(pattern, word, pictures, row)]
        return Example(
            pictures=tuple(shown),
            prompt=prompt,
            answers=taught(answers, self.train_answers),
            reference=answers,
            entry=f"{row.file}: {row.entry}",
        )


def _found(pattern: str, word: str, pictures: Pictures, row: Record) -> list[Picture]:
    """Return the pictures of one pattern: one, or one for each item of the field that holds a list."""
    fields = template_fields(pattern) - {"split"}
    if any(name in row.values and row.values[name] in (None, []) for name in fields):
        return []
    lists = [name for name in fields if isinstance(row.values.get(name), list)]
    if len(lists) > 1:
        raise row.wrong(f"its {' and '.join(sorted(lists))} are lists; give at most one in `images` {pattern!r}")
    if any(_holds_pictures(row.values.get(name)) for name in fields):
        return _stored(pattern, row)
    values = {name: row.word(name) for name in fields if name not in lists}
    items: list[dict[str, Identifier]] = [{name: text} for name in lists for text in row.texts(name)] or [{}]
    return [pictures.find(pattern, row, split=word, **values, **item) for item in items]


def _holds_pictures(value: object) -> bool:
    return isinstance(value, StoredPicture) or (isinstance(value, list) and isinstance(value[0], StoredPicture))


def _stored(pattern: str, row: Record) -> list[Picture]:
    """Return the pictures that a field itself holds."""
    name = pattern.strip("{}")
    if pattern != f"{{{name}}}":
        raise row.wrong(f"`images` is {pattern!r}, but the row holds that picture itself; give its field alone")
    held = row.values[name] if isinstance(row.values[name], list) else [row.values[name]]
    return [_picture(each, row) for each in held]


def _picture(held: object, row: Record) -> Picture:
    if not isinstance(held, StoredPicture):
        raise row.wrong(f"one of its pictures is {held!r:.60}; leave out rows that lack one")
    return held.picture(row)


def _scores_of(metric: str) -> list[str]:
    """Return the names of the scores that a metric gives.

    Raises:
        ValueError: It is unknown or takes no texts.
    """
    made = TEXT_METRICS.get(metric)()
    try:
        made.update(["a"], [["a"]])
        value = made.compute()
    except Exception as error:  # whatever a metric of other things meets
        raise ValueError(f"`metric` {metric!r} takes no predicted texts with lists of right ones: {error}") from error
    return list(value) if isinstance(value, dict) else [metric]
