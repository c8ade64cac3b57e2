"""The page of a demonstration."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moadapt.reporting.document import write_document
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


def write_report(details: Mapping[str, Any], file: Path) -> None:
    """Write the page of a demonstration.

    Args:
        details: What the demonstration found; any part may be empty or missing, and the page then says so. `title`,
            `command`, `seed`, `seconds`, `settings` by name, `about` in words; `rows`, the results by way of sharing
            adapters; `losses` by run and task as pairs of step and loss; `routing` with its mean weights; `parameters`
            by run; `merges`, the reports of all merges; `examples`, test inputs with all predictions.
        file: Where to write it; replaced at once where it exists.
    """
    sections = {
        "results": ("Results", results(details.get("rows") or [])),
        "examples": ("Predictions", examples(details.get("examples") or [])),
        "routing": ("Routing", routing(details.get("routing") or {})),
        "losses": ("Loss", losses(details.get("losses") or {})),
        "parameters": ("Parameters", parameters(details.get("parameters") or [])),
        "merges": ("Merging", merges(details.get("merges") or [])),
        "settings": ("Settings", settings_section(details)),
    }
    write_document(file, str(details.get("title") or "moadapt report"), sections, introduction(details))


def settings_section(details: Mapping[str, Any]) -> Markup:
    """Return the section of the settings.

    Args:
        details: `settings` by name, `seed`, `command`, `seconds`; any may be missing.
    """
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
