"""Templates of a task's settings: path patterns, split words, prompts; checked when the task is made."""

from collections.abc import Collection, Mapping
from pathlib import Path
from string import Formatter
from typing import TypeVar

from moadapt.task import SPLITS
from moadapt_tasks.records import Identifier, Record

Words = TypeVar("Words")


def own_words() -> dict[str, str]:
    """Return the split words of files that use our own names."""
    return {split: split for split in SPLITS}


def split_word(splits: Mapping[str, Words], split: str) -> Words:
    """Return what the files call a split.

    Raises:
        ValueError: The task has no such split.
    """
    if split not in splits:
        raise ValueError(f"this task has no split {split!r}; its `splits` name {', '.join(splits) or 'none'}")
    return splits[split]


def check_splits(splits: Mapping[str, object]) -> None:
    """Require words for some of our splits.

    Raises:
        ValueError: There are none, or one is not ours.
    """
    if not splits or not set(splits) <= set(SPLITS):
        given = ", ".join(splits) or "nothing"
        raise ValueError(f"`splits` names {given}; give words for some of {', '.join(SPLITS)}, as in train: train2014")


def check_numbers(max_new_tokens: int, limit: int | None) -> None:
    """Require positive numbers.

    Raises:
        ValueError: One is below 1.
    """
    for name, number in (("max_new_tokens", max_new_tokens), ("limit", limit)):
        if number is not None and number < 1:
            raise ValueError(f"`{name}` is {number}; give at least 1")


def check_template(name: str, template: str, accepted: Collection[str], needed: Collection[str] = ()) -> None:
    """Require that a template can be filled.

    Args:
        name: The setting that holds it.
        template: A format string.
        accepted: Names that it may mention.
        needed: Names of which it must mention one, if there are any.

    Raises:
        ValueError: It is no format string, or mentions the wrong names.
    """
    found = _checked_fields(name, template)
    if not found <= set(accepted) or (needed and not found & set(needed)):
        must = f", with {' or '.join(f'{{{field}}}' for field in needed)}" if needed else ""
        allowed = ", ".join(f"{{{field}}}" for field in accepted)
        raise ValueError(f"`{name}` is {template!r}; give a template of {allowed}{must}")


def check_own_template(name: str, template: str) -> None:
    """Require a format string that mentions plain names: fields of the user's own files.

    Raises:
        ValueError: It is none, or mentions places, attributes or items.
    """
    odd = [field for field in _checked_fields(name, template) if not field or field.isdigit() or set(field) & set(".[")]
    if odd:
        raise ValueError(f"`{name}` is {template!r}, which mentions {{{odd[0]}}}; give names of fields")


def template_fields(template: str) -> set[str]:
    """Return the names that a format string mentions."""
    return {field for _, field, _, _ in Formatter().parse(template) if field is not None}


def picture_path(pattern: str, record: Record, **values: Identifier) -> Path:
    """Fill the path pattern of a picture.

    Raises:
        Defect: A value does not suit its format specification.
    """
    try:
        return Path(pattern.format(**values))
    except ValueError as error:
        given = ", ".join(f"{name} {value!r}" for name, value in values.items() if name != "split")
        raise record.wrong(f"{given} does not fit `images` {pattern!r}: {error}") from error


def _checked_fields(name: str, template: str) -> set[str]:
    try:
        return template_fields(template)
    except ValueError as error:
        raise ValueError(f"`{name}` is {template!r}, no template: {error}; write a literal brace twice") from error
