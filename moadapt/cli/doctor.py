"""`moadapt doctor`: what becomes of every tensor of a foreign adapter on a base, or why it is refused."""

import json as json_format
from collections.abc import Mapping

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from transformers import PreTrainedModel

from moadapt.bases import load_base, outline
from moadapt.cli.spelled import spelled
from moadapt.hub.adapter_folder import find_folder, open_folder
from moadapt.hub.diagnosis import Diagnosis
from moadapt.hub.reading import examine

_SHOWN = 8


def doctor(
    folders: list[str],
    base: str | None = None,
    initial: str | None = None,
    weights: bool = False,
    keys: bool = False,
    json: bool = False,
) -> int:
    """Tell what becomes of every tensor of adapters on a base; nothing is composed, and nothing of theirs is run.

    Args:
        folders: Folders of the peft library's LoRAs, `.safetensors` files, or hub names.
        base: A registered short name, a folder or a hub name; by default the one that the first adapter names.
        initial: Of adapters that were taken off their base before training, how they were then:
            '{FOLDER: FOLDER_BEFORE}'.
        weights: Load the base's weights too, to compare values with what adapters have of it.
        keys: Show every tensor, and not only those that are refused or converted.
        json: Print everything as JSON.

    Returns:
        1 where any adapter is refused, else 0.

    Raises:
        ValueError: No base is named, or it cannot be loaded.
    """
    name = base or base_of(folders[0])
    model: PreTrainedModel = load_base(name)[0] if weights else outline(name)
    before = spelled(initial) if initial is not None else {}
    if not isinstance(before, Mapping):
        raise ValueError(f"--initial is {initial!r}; give '{{FOLDER: FOLDER_BEFORE}}'")
    found = [examine(folder, model, initial=before.get(folder))[0] for folder in folders]
    if json:
        print(json_format.dumps([each.as_json() for each in found], indent=2))
    else:
        for each in found:
            _show(each, every=keys)
    return int(any(each.refused for each in found))


def base_of(reference: str) -> str:
    """Return the base that an adapter names.

    Args:
        reference: A folder or a hub name.

    Raises:
        ValueError: It names none.
    """
    config = open_folder(find_folder(reference)).config or {}
    named = config.get("base_model_name_or_path")
    if not isinstance(named, str) or not named:
        raise ValueError(f"{reference} does not name its base; give --base")
    return named


def _show(found: Diagnosis, *, every: bool) -> None:
    console = Console()
    verdict = "[red]refused[/red]" if found.refused else "[green]can be composed[/green]"
    counts = ", ".join(f"{count} {fate}" for fate, count in found.counts.items())
    console.print(f"[bold]{escape(found.source)}[/bold]: {escape(found.kind)} {verdict}; {counts or 'no tensors'}")
    for line in found.refusals:
        console.print(f"  [red]refused:[/red] {escape(line)}", highlight=False)
    for line in found.notes:
        console.print(f"  note: {escape(line)}", highlight=False)
    shown = [key for key in found.keys if every or key.fate in ("refused", "converted")]
    if not shown:
        return
    table = Table("tensor", "fate", "module", "why")
    for key in shown if every else shown[:_SHOWN]:
        table.add_row(escape(key.key), key.fate, escape(key.target or ""), escape(key.why))
    console.print(table)
    if len(shown) > _SHOWN and not every:
        console.print(f"  and {len(shown) - _SHOWN} more; --keys shows all", highlight=False)
