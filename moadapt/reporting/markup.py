"""HTML from nested calls. Text is escaped on the way in, so what comes from data cannot become markup.

Example:
    >>> element("p", "1 < 2", class_="note")
    '<p class="note">1 &lt; 2</p>'
"""

from html import escape

VOID = frozenset({"br", "col", "hr", "img", "input", "meta"})


class Markup(str):
    """Text that is HTML already and is not escaped again."""

    __slots__ = ()


Child = str | None
"""A plain string is escaped, `Markup` is kept, None leaves nothing."""


def fragment(*children: Child) -> Markup:
    """Join children without an element around them.

    Args:
        children: In order.
    """
    return Markup("".join(_written(child) for child in children))


def element(tag: str, *children: Child, **attributes: str | float | bool | None) -> Markup:
    """Write one element.

    Args:
        tag: Its name.
        children: What stands in it, in order.
        attributes: By name; a trailing underscore is dropped and others become hyphens. True writes the name alone,
            False and None leave it out.
    """
    start = f"<{tag}{''.join(_attribute(name, value) for name, value in attributes.items())}>"
    if tag in VOID:
        return Markup(start)
    return Markup(f"{start}{fragment(*children)}</{tag}>")


def _written(child: Child) -> str:
    if child is None:
        return ""
    return child if isinstance(child, Markup) else escape(child)


def _attribute(name: str, value: str | float | bool | None) -> str:
    name = name.rstrip("_").replace("_", "-")
    if value is None or value is False:
        return ""
    return f" {name}" if value is True else f' {name}="{escape(str(value))}"'
