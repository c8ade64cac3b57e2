"""What was done, for somebody who has never seen the project."""

from collections.abc import Mapping, Sequence
from typing import Any

from moadapt.reporting.markup import Markup, element, fragment
from moadapt.reporting.numerals import count, duration
from moadapt.reporting.palette import shade_of
from moadapt.reporting.section import defined, section, swatch
from moadapt.reporting.wording import TASKS, listed, row_words, spelled

_READING = ("softmax", "top_k")
"""Routers that look at the input."""


def introduction(details: Mapping[str, Any]) -> Markup:
    """Say what was trained, on what, and what the rows of the results are.

    Args:
        details: Everything the page is made from.
    """
    tasks = _tasks(details)
    about = details.get("about")
    return section(
        "about",
        "What this is",
        element("p", _idea(tasks)),
        element("p", about) if about else None,
        element("p", *_circumstances(details)),
        _legend([str(row["name"]) for row in details.get("rows") or ()]),
    )


def _tasks(details: Mapping[str, Any]) -> list[str]:
    routed = (details.get("routing") or {}).get("tasks") or ()
    shown = [example["task"] for example in details.get("examples") or ()]
    return list(dict.fromkeys([*routed, *shown])) or list(TASKS)


def _idea(tasks: Sequence[str]) -> str:
    named = listed([TASKS.get(task, task) for task in tasks])
    several = f"{spelled(len(tasks))} tasks at once: to {named}" if len(tasks) > 1 else f"one task: to {named}"
    return (
        "A vision-language model reads a picture with a text and answers in text. Here all its own weights stayed "
        "frozen. What was trained are LoRA adapters, small additions to its weight matrices that can be taken off "
        f"again, for {several}. The page compares ways to share adapters between tasks, and shows what each way "
        "answers, what the routers of the mixture learned, and what is lost when the mixture is folded into one model."
    )


def _circumstances(details: Mapping[str, Any]) -> list[str | Markup]:
    settings = details.get("settings") or {}
    parts: list[str | Markup] = []
    if "base" in settings and "data" in settings:
        parts += ["The base model is ", _code(settings["base"]), ", the data set ", _code(settings["data"]), ". "]
    if "steps" in settings and "batch_size" in settings:
        rows = f"{count(settings['steps'])} steps of {count(settings['batch_size'])} rows"
        parts.append(f"Every run saw the same {rows}, the tasks mixed in every batch. ")
    if "router" in settings:
        reads = " reads each input and is not told its task" if settings["router"] in _READING else " was used"
        parts += ["In the mixture the router ", _code(settings["router"]), f"{reads}. "]
    parts.append("Pictures and answers below are from the test split, which no training saw. ")
    if details.get("seconds") is not None:
        parts.append(f"Everything together took {duration(details['seconds'])}. ")
    return parts


def _code(value: Any) -> Markup:
    return element("code", str(value))


def _legend(names: Sequence[str]) -> Markup | None:
    if not names:
        return None
    terms = [
        (fragment(swatch(shade_of(name).variable), row_words(name).title), fragment(row_words(name).meaning, _id(name)))
        for name in names
    ]
    return fragment(
        element("h3", "The rows"),
        element("p", "Each has its colour throughout the page.", class_="aside"),
        defined(terms, "legend"),
    )


def _id(name: str) -> Markup:
    return fragment(" ", element("code", name))
