"""Checks of the rows that are given to a metric, made before any state changes."""

from collections.abc import Sequence


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
    for row, (pred, texts) in enumerate(zip(preds, targets, strict=True)):
        if not isinstance(pred, str):
            raise ValueError(f"preds[{row}] is {pred!r}, not a text; give the generated text as a str")
        if isinstance(texts, str) or not all(isinstance(text, str) for text in texts):
            raise ValueError(f"{targets_name}[{row}] is {texts!r}; give a list of str, one for each human's text")
        if len(texts) == 0:
            raise ValueError(f"{targets_name}[{row}] is empty; give at least one text a row, or leave the row out")
