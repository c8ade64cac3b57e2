"""The frame that every section of the page has."""

from collections.abc import Sequence

from moadapt.reporting.markup import Child, Markup, element


def section(name: str, title: str, *children: Child) -> Markup:
    """Return a section with its heading.

    Args:
        name: Its address on the page.
        title: Its heading.
        children: What stands under the heading.
    """
    return element("section", element("h2", title), *children, id=name)


def nothing(what: str) -> Markup:
    """Return the note that stands where a part has not been made.

    Args:
        what: Why there is nothing, as a sentence.
    """
    return element("p", what, class_="nothing")


def swatch(variable: str) -> Markup:
    """Return a small patch of a colour.

    Args:
        variable: The colour's variable.
    """
    return element("i", class_="swatch", style=f"background:var({variable})", aria_hidden="true")


def defined(pairs: Sequence[tuple[Child, Child]], class_: str) -> Markup:
    """Return a list of terms and what they mean.

    Args:
        pairs: Term and meaning.
        class_: Its class in the style sheet.
    """
    entries = [element("div", element("dt", term), element("dd", meaning)) for term, meaning in pairs]
    return element("dl", *entries, class_=class_)


def figure(content: Markup, caption: Child) -> Markup:
    """Return a chart with its caption above it.

    Args:
        content: The chart.
        caption: What it shows.
    """
    return element("figure", element("figcaption", caption), content)


def figures(*children: Markup) -> Markup:
    """Return figures side by side where there is room.

    Args:
        children: The figures.
    """
    return element("div", *children, class_="figures")
