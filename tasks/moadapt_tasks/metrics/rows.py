"""Checks of the rows that are given to a metric, made before any state changes."""

from collections.abc import Iterable, Mapping, Sequence


def check_rows(preds: Sequence[object], targets: Sequence[object], targets_name: str) -> None:
    """Require as many predictions as targets, both given as lists.

    Raises:
        ValueError: One of the two is a single text, or their lengths differ; the message says both.
    """
    for name, rows in (("preds", preds), (targets_name, targets)):
        if isinstance(rows, str):
            raise ValueError(f"{name} is the single text {rows!r}; give a list with one entry a row")
    if len(preds) != len(targets):
        raise ValueError(
            f"preds has {len(preds)} rows and {targets_name} has {len(targets)}; give one of each for every row"
        )


def check_text_rows(preds: Sequence[str], targets: Sequence[Sequence[str]], targets_name: str) -> None:
    """Require one text and one non-empty list of texts a row.

    Raises:
        ValueError: The lengths differ, or a row holds something else; the message names the row.
    """
    check_rows(preds, targets, targets_name)
    check_preds(preds)
    for row, texts in enumerate(targets):
        if not is_texts(texts):
            raise ValueError(f"{targets_name}[{row}] is {texts!r}; give a list of str, one for each human's text")
        if len(texts) == 0:
            raise ValueError(f"{targets_name}[{row}] is empty; give at least one text a row, or leave the row out")


def check_preds(preds: Sequence[object]) -> None:
    """Require predictions that are texts.

    Raises:
        ValueError: One is something else; the message names its row.
    """
    for row, pred in enumerate(preds):
        if not isinstance(pred, str):
            raise ValueError(f"preds[{row}] is {pred!r}, not a text; give the generated text as a str")


def check_keys(references: Sequence[object], keys: Iterable[str]) -> None:
    """Require references that say a text under each of some keys.

    Raises:
        ValueError: One is no mapping, lacks a key or holds something else under it; the message names its row.
    """
    for row, reference in enumerate(references):
        if not isinstance(reference, Mapping):
            raise ValueError(f"references[{row}] is {reference!r}; give a mapping with {', '.join(keys)}")
        for key in keys:
            if not isinstance(reference.get(key), str):
                raise ValueError(f"references[{row}] has {reference.get(key)!r} under {key!r}; give a text")


def is_texts(value: object) -> bool:
    """Tell whether a value is a list of texts."""
    return isinstance(value, Sequence) and not isinstance(value, str) and all(isinstance(text, str) for text in value)
