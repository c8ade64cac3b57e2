"""Test inputs with what every row answered, a grid of cards per task."""

from collections.abc import Sequence

from moadapt.reporting.cards import Example, card, predictions_of, verdict
from moadapt.reporting.markup import Markup, element, fragment
from moadapt.reporting.palette import shade_of
from moadapt.reporting.section import nothing, section, swatch
from moadapt.reporting.wording import row_words, task_title

_JUDGE = "mixture"
"""The row whose answers decide the order, and whose boxes show first."""
_ORDER = ("right", "same", "", "wrong")


def examples(shown: Sequence[Example]) -> Markup:
    """Return the section of the predictions.

    Args:
        shown: Test inputs of any tasks, each with its predictions by row.
    """
    if not shown:
        return section("examples", "Predictions", nothing("No predictions have been made yet."))
    note = (
        "Inputs of the test split. Where answers are right (✓) or wrong (✗), some that the mixture got wrong were "
        "picked on purpose, so how many are right here says nothing; the table above counts all. A caption marked = is "
        "word for word one of the references. Rows that gave the same answer share a line."
    )
    tasks = dict.fromkeys(str(example["task"]) for example in shown)
    groups = [
        _group(f"examples-{index}", task, [example for example in shown if example["task"] == task])
        for index, task in enumerate(tasks)
    ]
    names = dict.fromkeys(name for example in shown for name in predictions_of(example))
    key = [element("span", swatch(shade_of(name).variable), row_words(name).short) for name in names]
    return section("examples", "Predictions", element("p", note), element("p", *key, class_="key"), *groups)


def _group(name: str, task: str, shown: Sequence[Example]) -> Markup:
    verdicts = [verdict(example, _JUDGE) for example in shown]
    ordered = sorted(zip(verdicts, shown, strict=True), key=lambda pair: _ORDER.index(pair[0]))
    boxed = any(example.get("box") is not None for example in shown)
    rows = list(dict.fromkeys(row for example in shown for row in predictions_of(example))) if boxed else []
    prompts = {str(example.get("prompt", "")) for example in shown}
    alike = len(prompts) == 1 and len(shown) > 1
    asked = f", all asked “{prompts.pop()}”" if alike else ""
    drawn = [card(example, rows, with_prompt=not alike) for _, example in ordered]
    heading = element(
        "h3", task_title(task), " ", element("small", f"{len(shown)} inputs{asked}; {_counted(verdicts)}")
    )
    cards = element("div", *drawn, class_=f"cards {_shape(shown, boxed)}")
    return fragment(heading, element("div", *_choice(name, rows), cards))


def _shape(shown: Sequence[Example], boxed: bool) -> str:
    """Return how much room a card's picture and its texts take."""
    if boxed:
        return "tall"
    return "long" if any(len(example.get("references") or ()) > 1 for example in shown) else "short"


def _counted(verdicts: Sequence[str]) -> str:
    right, wrong = verdicts.count("right"), verdicts.count("wrong")
    if right or wrong:
        return f"the mixture is right on {right} and wrong on {wrong}"
    return f"the mixture gave a reference word for word on {verdicts.count('same')}"


def _choice(name: str, rows: Sequence[str]) -> list[Markup]:
    """Return radio buttons that choose, without any script, whose boxes are drawn."""
    if not rows:
        return []
    chosen = _JUDGE if _JUDGE in rows else rows[-1]
    parts = [element("span", "Reference dashed, prediction solid. Boxes of ", class_="ask")]
    for index, row in enumerate(rows):
        button = f"{name}-{index}"
        parts += [
            element("input", type="radio", name=name, id=button, class_=f"pick pick-{index}", checked=row == chosen),
            element("label", swatch(shade_of(row).variable), row_words(row).short, for_=button),
        ]
    return parts


def picking(most: int) -> str:
    """Return the rules that show the chosen row's boxes.

    Args:
        most: How many rows there can be.
    """
    return "".join(f".pick-{index}:checked~.cards .of-{index}{{display:inline}}" for index in range(most))
