"""Multiple choice as text: options with letters before them, and the letter that an answer means."""

import re
import string
from collections.abc import Sequence

from moadapt_tasks.records import Record

LETTERS = string.ascii_uppercase

_LEADING = re.compile(r"\(([A-Z])\)|([A-Z])(?=[.:),]|\s*$)", re.IGNORECASE)
_NAMED = re.compile(r"\b(?:answer|option|choice)\b[\s:]*(?:is\b[\s:]*)?\(?([A-Z])\b(?!')", re.IGNORECASE)


def check_options(options: Sequence[str], record: Record) -> None:
    """Require as many options as there can be.

    Raises:
        Defect: There are fewer than two, or more than letters.
    """
    if not 2 <= len(options) <= len(LETTERS):
        raise record.wrong(f"it has {len(options)} answers to choose from; give 2 to {len(LETTERS)}")


def lettered(options: Sequence[str]) -> str:
    r"""Return one option a line, with letters.

    Example:
        >>> lettered(["red", "blue"])
        'A. red\nB. blue'
    """
    return "\n".join(f"{letter}. {option}" for letter, option in zip(LETTERS, options, strict=False))


def meant(text: str, options: Sequence[str]) -> str:
    """Return the letter of the option that a text means, or the empty text where it means none.

    It begins with a letter, `B`, `(b)` or `B. blue`, or is an option, `blue`, or names a letter, `the answer is B`.

    Args:
        text: What a model wrote.
        options: Those it was given.
    """
    written, letters = text.strip(), LETTERS[: len(options)]
    leading = _LEADING.match(written)
    if leading and (found := (leading[1] or leading[2]).upper()) in letters:
        return found
    spelled = [_spelling(option) for option in options]
    if _spelling(written) in spelled:
        return letters[spelled.index(_spelling(written))]
    named = _NAMED.search(written)
    return named[1].upper() if named and named[1].upper() in letters else ""


def _spelling(text: str) -> str:
    return " ".join(text.casefold().split()).rstrip(".")
