"""Fills what the code knows best into the pages when the site is built.

A page holds a placeholder on a line of its own: `<!-- parts: ROUTERS -->` becomes a table of a registry's parts,
`<!-- modules: moadapt/adapters -->` the API of every module in a folder, `<!-- configs -->` a table of the runnable
configurations, `<!-- tuners -->` tables of the kinds of tuner in the peft library. So a new part needs no edit here.
"""

import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from moadapt import registry
from moadapt.adapters.peft_kinds import HOSTED, REFUSED, not_tried

ROOT = Path(__file__).parent.parent
PLACEHOLDER = re.compile(r"^<!-- (parts|modules|configs|tuners)(?:: (\S+))? -->$", re.MULTILINE)


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Replace the placeholders of a page; mkdocs calls this.

    Args:
        markdown: Text of the page.
    """
    writers = {"parts": parts_table, "modules": module_list, "configs": configs_table, "tuners": tuner_tables}
    return PLACEHOLDER.sub(lambda found: writers[found[1]](found[2]), markdown)


def parts_table(name: str) -> str:
    """Return a table with one row a part.

    Args:
        name: Name of a registry in `moadapt.registry`.
    """
    rows = [
        f"| `{short}` | [`{part.__name__}`][{part.__module__}.{part.__qualname__}] | {_summary(part)} |"
        for short, part in getattr(registry, name)
    ]
    return "\n".join(["| short name | class | what it is |", "|---|---|---|", *rows])


def module_list(folder: str) -> str:
    """Return a mkdocstrings block for every public module in a folder, not below it.

    Args:
        folder: Relative to the repository's root; where it does not exist, the list is empty.
    """
    return "\n\n".join(f"::: {module}" for module in _modules(ROOT / folder))


def configs_table(_: None) -> str:
    """Return a table of the files in `configs/`, each with the first sentence of its head comment."""
    rows = []
    for path in sorted((ROOT / "configs").rglob("*.yaml")):
        head = re.match(r"(?:#.*\n)+", path.read_text(encoding="utf-8"))
        words = re.sub(r"\n?# ?", " ", head[0] if head else "").split(". ")[0].strip()
        rows.append(f"| `{path.relative_to(ROOT)}` | {words} |")
    return "\n".join(["| file | what it runs |", "|---|---|", *rows])


def tuner_tables(_: None) -> str:
    """Return a table of the kinds of tuner that can be hosted, and one of the others with the reason."""
    starts = {"exact": "yes", "rounding": "to rounding", "never": "no"}
    hosted = [
        f"| `{kind}` | {known.what} | {starts[known.start]} | {'yes' if known.mergeable else 'no'} |"
        for kind, known in sorted(HOSTED.items())
    ]
    refused = [f"| `{kind}` | {reason} |" for kind, reason in sorted(REFUSED.items())]
    refused += [f"| `{kind}` | was not tried yet |" for kind in not_tried()]
    head = ["| kind | what it trains | starts as the base | merges |", "|---|---|---|---|"]
    return "\n".join([*head, *hosted, "", "| kind | why it is not hosted: it |", "|---|---|", *refused])


def _summary(part: type[Any]) -> str:
    return (inspect.getdoc(part) or "").splitlines()[0].replace("|", "\\|")


def _modules(folder: Path) -> Iterator[str]:
    package = folder.relative_to(ROOT).parts
    root = package[1:] if package[0] in ("routers", "tasks") else package
    for path in sorted(folder.glob("*.py")):
        if not path.stem.startswith("_"):
            yield ".".join((*root, path.stem))
