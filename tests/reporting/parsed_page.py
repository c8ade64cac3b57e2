"""Reads a page back: its elements, its text, and whether every tag is closed where it should be."""

from dataclasses import dataclass, field
from html.parser import HTMLParser

_VOID = {"br", "col", "hr", "img", "input", "meta", "link", "base", "area", "embed", "source", "track", "wbr"}


@dataclass
class Element:
    tag: str
    attributes: dict[str, str]
    text: list[str] = field(default_factory=list)

    @property
    def words(self) -> str:
        """The text in it and below it."""
        return " ".join(" ".join(self.text).split())


class ParsedPage(HTMLParser):
    """All elements of a page in order; refuses tags that do not pair."""

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[Element] = []
        self._open: list[Element] = []
        self.feed(page)
        self.close()
        assert not self._open, f"never closed: {[element.tag for element in self._open]}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        element = Element(tag, {name: value or "" for name, value in attrs})
        self.elements.append(element)
        if tag not in _VOID:
            self._open.append(element)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append(Element(tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self._open, f"</{tag}> closes nothing"
        assert self._open[-1].tag == tag, f"</{tag}> closes <{self._open[-1].tag}>"
        self._open.pop()

    def handle_data(self, data: str) -> None:
        for element in self._open:
            element.text.append(data)

    def all(self, tag: str, class_: str | None = None) -> list[Element]:
        """Elements of a tag, and of a class where one is given."""
        found = [element for element in self.elements if element.tag == tag]
        return [e for e in found if class_ is None or class_ in e.attributes.get("class", "").split()]

    def section(self, name: str) -> Element:
        """The section with an address."""
        return next(element for element in self.all("section") if element.attributes["id"] == name)
