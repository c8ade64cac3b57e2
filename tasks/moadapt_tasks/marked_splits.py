"""Files that hold several splits, each entry marked with the word of its own."""

from collections.abc import Mapping, Sequence

from moadapt.task import BadExample
from moadapt_tasks.patterns import check_splits
from moadapt_tasks.reading import Table
from moadapt_tasks.records import Record, collect


def check_marks(splits: Mapping[str, Sequence[str]]) -> None:
    """Require words for some of our splits, a list of them for each.

    Raises:
        ValueError: There are none, one is not ours, or one has no list.
    """
    check_splits(splits)
    for split, words in splits.items():
        if isinstance(words, str) or not words:
            raise ValueError(
                f"`splits` gives {words!r} for {split}; give a list of words, as in train: [train, restval]"
            )


def entries_of(table: Table, words: Sequence[str]) -> tuple[list[Record], list[BadExample]]:
    """Return the entries whose `split` is one of some words, and all that cannot be used of the table.

    Raises:
        ValueError: No entry is; the words that there are are named.
    """
    marked, bad = collect(table.rows.values(), lambda entry: (entry.text("split"), entry))
    found = [entry for word, entry in marked if word in words]
    if not found:
        given, others = " or ".join(map(repr, words)), ", ".join(sorted({word for word, _ in marked})) or "none"
        raise ValueError(
            f"{table.file}: no entry is of split {given}; there are {others}. Set `splits` to the file's words"
        )
    return found, table.bad + bad
