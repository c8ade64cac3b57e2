"""The page of a finished run: what its routers learned, and how the training went."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moadapt.reporting.answers import answers
from moadapt.reporting.document import write_document
from moadapt.reporting.expert_use import expert_use, task_table
from moadapt.reporting.losses import losses
from moadapt.reporting.markup import Markup, element
from moadapt.reporting.measure_curves import measure_curves
from moadapt.reporting.numerals import fixed
from moadapt.reporting.page import settings_section
from moadapt.reporting.routed_examples import routed_examples
from moadapt.reporting.routing import routing
from moadapt.reporting.section import defined, section


def write_run_report(details: Mapping[str, Any], file: Path) -> None:
    """Write the page of a run.

    Args:
        details: What the run left; any part may be empty or missing, and the page then says so. `title`, `about` in
            sentences, `scores` by name, names of `experts` (none where nothing is routed), `record` as `routing.json`
            has it, `curves` by measure and place, `objectives` by name, `losses` by run and task, `examples` with the
            routing that they got, `predictions`, `settings` by name, `command`.
        file: Where to write it; replaced at once where it exists.
    """
    sections = {
        **(_routed(details) if details.get("experts") else {}),
        "losses": ("Loss", losses(details.get("losses") or {})),
        "answers": ("Answers", answers(details.get("predictions") or [])),
        "settings": ("Settings", settings_section(details)),
    }
    write_document(file, str(details.get("title") or "moadapt report"), sections, _opening(details))


def _opening(details: Mapping[str, Any]) -> Markup:
    scores = [(name, fixed(value, 3)) for name, value in (details.get("scores") or {}).items()]
    return section(
        "about",
        "What this is",
        *(element("p", sentence) for sentence in details.get("about") or ()),
        element("p", "Scores of the last validation:") if scores else None,
        defined(scores, "settings") if scores else None,
    )


def _routed(details: Mapping[str, Any]) -> dict[str, tuple[str, Markup]]:
    """Return the sections of a run that has experts."""
    record, objectives = details.get("record") or {}, details.get("objectives") or {}
    experts = list(map(str, details["experts"]))
    return {
        "routing": ("Routing", routing(task_table(record))),
        "use": ("Use of experts", expert_use(record)),
        "inputs": ("Inputs", routed_examples(details.get("examples") or [], experts)),
        "curves": ("Measures", measure_curves(details.get("curves") or {}, objectives, len(experts))),
    }
