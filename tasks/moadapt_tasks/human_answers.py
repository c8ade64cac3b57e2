"""What several people answered to one question, and which of it a model is taught."""

from collections import Counter
from collections.abc import Sequence
from functools import lru_cache
from typing import Literal

from moadapt_tasks.metrics.vqa_answers import normalise_answer, strip_answer

TrainAnswers = Literal["most_common", "all"]


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
