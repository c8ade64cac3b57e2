"""One test input as a card: its picture, what was asked and expected, and what every row answered."""

from collections.abc import Mapping, Sequence
from typing import Any

from moadapt.reporting.markup import Child, Markup, element, fragment
from moadapt.reporting.numerals import fixed
from moadapt.reporting.palette import shade_of
from moadapt.reporting.pictures import Outline, overlap, picture
from moadapt.reporting.section import swatch
from moadapt.reporting.wording import row_words

Example = Mapping[str, Any]

_MARKS = {
    "right": element("span", "✓", class_="right", title="right", role="img", aria_label="right"),
    "wrong": element("span", "✗", class_="wrong", title="wrong", role="img", aria_label="wrong"),
    "same": element("span", "=", class_="right", title="as a reference", role="img", aria_label="as a reference"),
    "": element("span"),
}


def predictions_of(example: Example) -> Mapping[str, Mapping[str, Any]]:
    """Return an example's predictions by row, which may be none.

    Args:
        example: A test input.
    """
    found: Mapping[str, Mapping[str, Any]] = example.get("predictions") or {}
    return found


def verdict(example: Example, row: str) -> str:
    """Return `right`, `wrong`, or `same` for a text that is one of the references where nothing is right or wrong.

    Args:
        example: A test input.
        row: Whose prediction to judge.

    Returns:
        The verdict; empty where there is none.
    """
    prediction = predictions_of(example).get(row) or {}
    if prediction.get("right") is not None:
        return "right" if prediction["right"] else "wrong"
    references = {str(reference).strip() for reference in example.get("references") or ()}
    return "same" if str(prediction.get("text", "")).strip() in references else ""


def card(example: Example, rows: Sequence[str], *, with_prompt: bool) -> Markup:
    """Return the card of an example.

    Args:
        example: A test input.
        rows: Names in the order in which boxes can be chosen.
        with_prompt: Whether to write what was asked.
    """
    boxed = example.get("box") is not None
    prompt = str(example.get("prompt", ""))
    outlines = _outlines(example, rows) if boxed else []
    return element(
        "article",
        *(picture(file, outlines, alt=f"picture for: {prompt}") for file in example.get("images") or ()),
        element(
            "div",
            element("p", prompt, class_="prompt") if with_prompt else None,
            None if boxed else _expected([str(reference) for reference in example.get("references") or ()]),
        ),
        element("table", element("tbody", *(_fits(example) if boxed else _answers(example))), class_="answers"),
        class_="card",
    )


def _outlines(example: Example, rows: Sequence[str]) -> list[Outline]:
    predicted = [
        Outline(prediction["box"], "prediction", f"of-{rows.index(row)}", shade_of(row).dark)
        for row, prediction in predictions_of(example).items()
        if prediction.get("box") is not None
    ]
    return [*predicted, Outline(example["box"], "reference", "", None)]


def _expected(references: Sequence[str]) -> Markup | None:
    if not references:
        return None
    first = element("p", element("span", "expected ", class_="aside"), references[0])
    rest = [element("p", reference) for reference in references[1:]]
    more = element("details", element("summary", f"{len(rest)} more"), *rest) if rest else None
    return fragment(first, more)


def _answers(example: Example) -> list[Markup]:
    """Return a line for each different answer, with the rows that gave it."""
    given: dict[tuple[str, str], list[str]] = {}
    for row, prediction in predictions_of(example).items():
        given.setdefault((str(prediction.get("text", "")), verdict(example, row)), []).append(row)
    return [
        _line(mark, text or element("em", "nothing"), fragment(*map(_patch, rows)))
        for (text, mark), rows in given.items()
    ]


def _patch(row: str) -> Markup:
    name = row_words(row).short
    return element("span", swatch(shade_of(row).variable), title=name, role="img", aria_label=name)


def _fits(example: Example) -> list[Markup]:
    """Return a line for each row, with how well its box fits."""
    lines = []
    for row, prediction in predictions_of(example).items():
        box = prediction.get("box")
        name = fragment(swatch(shade_of(row).variable), row_words(row).short)
        if box is None:
            name = fragment(name, element("q", str(prediction.get("text", "")), class_="aside"))
        fit = "no box" if box is None else f"IoU {fixed(overlap(example['box'], box))}"
        lines.append(_line(verdict(example, row), name, fit))
    return lines


def _line(mark: str, text: Child, last: Child) -> Markup:
    return element(
        "tr", element("td", _MARKS[mark], class_="mark"), element("td", text), element("td", last, class_="who")
    )
