"""A page as one HTML file that loads nothing from anywhere."""

import os
from collections.abc import Mapping
from pathlib import Path

from moadapt.reporting.markup import Markup, element
from moadapt.reporting.style import style_sheet

_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
"""What a browser may load: nothing that is not in the file."""


def write_document(file: Path, title: str, sections: Mapping[str, tuple[str, Markup]], opening: Markup | None) -> None:
    """Write a page.

    Args:
        file: Where to write it; replaced at once where it exists.
        title: Its heading.
        sections: By address, the words of the link that leads there, and the section.
        opening: What stands before them.
    """
    links = [element("a", words, href=f"#{name}") for name, (words, _) in sections.items()]
    body = element(
        "body",
        element("header", element("h1", title), element("nav", *links)),
        element("main", opening, *(section for _, section in sections.values())),
        element("footer"),
    )
    page = "<!DOCTYPE html>\n" + element("html", _head(title), body, lang="en") + "\n"
    file.parent.mkdir(parents=True, exist_ok=True)
    fresh = file.with_name(f".{file.name}")
    fresh.write_text(page, encoding="utf-8")
    os.replace(fresh, file)


def _head(title: str) -> Markup:
    return element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", http_equiv="Content-Security-Policy", content=_POLICY),
        element("title", title),
        element("style", Markup(style_sheet())),
    )
