"""The page of a demonstration, one HTML file that loads nothing from anywhere."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moadapt.reporting.examples import examples
from moadapt.reporting.intro import introduction
from moadapt.reporting.losses import losses
from moadapt.reporting.markup import Markup, element, fragment
from moadapt.reporting.merges import merges
from moadapt.reporting.numerals import MISSING, duration
from moadapt.reporting.parameters import parameters
from moadapt.reporting.results import results
from moadapt.reporting.routing import routing
from moadapt.reporting.section import defined, nothing, section
from moadapt.reporting.style import style_sheet

_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
"""What a browser may load: nothing that is not in the file."""
_CONTENTS = {
    "results": "Results",
    "examples": "Predictions",
    "routing": "Routing",
    "losses": "Loss",
    "parameters": "Parameters",
    "merges": "Merging",
    "settings": "Settings",
}


def write_report(details: Mapping[str, Any], file: Path) -> None:
    """Write the page of a demonstration.

    Args:
        details: What the demonstration found; any part may be empty or missing, and the page then says so. `title`,
            `command`, `seed`, `seconds`, `settings` by name, `about` in words; `rows`, the results by way of sharing
            adapters; `losses` by run and task as pairs of step and loss; `routing` with its mean weights; `parameters`
            by run; `merges`, the reports of all merges; `examples`, test inputs with all predictions.
        file: Where to write it; replaced at once where it exists.
    """
    page = "<!DOCTYPE html>\n" + element("html", _head(details), _body(details), lang="en") + "\n"
    file.parent.mkdir(parents=True, exist_ok=True)
    fresh = file.with_name(f".{file.name}")
    fresh.write_text(page, encoding="utf-8")
    os.replace(fresh, file)


def _title(details: Mapping[str, Any]) -> str:
    return str(details.get("title") or "moadapt report")


def _head(details: Mapping[str, Any]) -> Markup:
    return element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", http_equiv="Content-Security-Policy", content=_POLICY),
        element("title", _title(details)),
        element("style", Markup(style_sheet())),
    )


def _body(details: Mapping[str, Any]) -> Markup:
    links = [element("a", title, href=f"#{name}") for name, title in _CONTENTS.items()]
    return element(
        "body",
        element("header", element("h1", _title(details)), element("nav", *links)),
        element(
            "main",
            introduction(details),
            results(details.get("rows") or []),
            examples(details.get("examples") or []),
            routing(details.get("routing") or {}),
            losses(details.get("losses") or {}),
            parameters(details.get("parameters") or []),
            merges(details.get("merges") or []),
            _settings(details),
        ),
        element("footer"),
    )


def _settings(details: Mapping[str, Any]) -> Markup:
    settings = dict(details.get("settings") or {})
    if details.get("seed") is not None:
        settings.setdefault("seed", details["seed"])
    entries = [(name, _setting(value)) for name, value in settings.items()]
    command, seconds = details.get("command"), details.get("seconds")
    return section(
        "settings",
        "Settings",
        defined(entries, "settings") if entries else nothing("No settings were given."),
        fragment(element("p", "This page was made by"), element("pre", element("code", command))) if command else None,
        element("p", f"Time in all: {duration(seconds)}.", class_="aside") if seconds is not None else None,
    )


def _setting(value: Any) -> str:
    return MISSING if value is None else f"{value:g}" if isinstance(value, float) else str(value)
