"""`moadapt inspect`: what a base is made of, and what an adapter on it would add."""

import json as json_format
from collections.abc import Sequence
from dataclasses import fields, replace
from itertools import groupby, pairwise
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from moadapt.bases import outline
from moadapt.cli.spelled import part_of, spelled
from moadapt.inspection import Inspection, SiteGroup, TowerReport, inspection
from moadapt.placement import Placement
from moadapt.presets import preset as find_preset
from moadapt.registry import FAMILIES
from moadapt.specs import fields_of, placement_of

_ANYWHERE = fields_of(Placement())
_UNITS = ("B", "KB", "MB", "GB")


def inspect(
    base: str | None = None,
    placement: str | None = None,
    preset: str | None = None,
    family: str | None = None,
    rank: int | None = None,
    train: str | None = None,
    batches: int = 8,
    json: bool = False,
) -> None:
    """Show the towers and sites of a base, and what one adapter costs there, or a training; no weights are loaded.

    Args:
        base: A registered short name, a folder or a hub name.
        placement: Where the adapter sits: a name such as top, or fields such as '{towers: [vision], depth: [0.5, 1]}'.
        preset: Family, rank and placement of a task's recipe: vqa, captioning or grounding.
        family: Short name of the adapter's family, by default lora, or its fields:
            '{name: bottleneck, width: 32}'.
        rank: Of a family that has one; with a preset, alpha stays twice the rank.
        train: In the place of all these, a configuration of `moadapt fit`, whose memory is estimated.
        batches: How many of its first batches are looked at for the largest.
        json: Print everything as JSON.

    Raises:
        ValueError: Something is unknown or said twice, or the adapter can sit nowhere on this base.
    """
    if (base is None) == (train is None):
        raise ValueError("inspect takes a base, or --train and a configuration; give exactly one of them")
    if train is not None:
        _print_memory(train, batches, json)
        return
    assert base is not None, "one of them is given"
    if preset is not None and family is not None:
        raise ValueError(f"--preset {preset} and --family {family} both name the adapter's family; give one of them")
    fields_given = {} if family is None or isinstance(parsed := spelled(family), str) else parsed
    for option, value in (("rank", rank), ("placement", placement)):
        if value is not None and option in fields_given:
            raise ValueError(f"--{option} {value} and --family {family} both give {option}; give one of them")
    spec: Any = part_of("lora" if family is None else family, FAMILIES) if preset is None else find_preset(preset, rank)
    if rank is not None and preset is None:
        if "rank" not in {field.name for field in fields(spec)}:
            known = ", ".join(field.name for field in fields(spec))
            raise ValueError(f"{type(spec).__name__} has no rank; give --family '{{name: {family}, ...}}' with {known}")
        spec = replace(spec, rank=rank)
    if placement is not None:
        spec = replace(spec, placement=placement_of(spelled(placement)))
    found = inspection(outline(base), spec)
    if json:
        print(json_format.dumps(found.as_json(), indent=2))
        return
    console = Console()
    for part in (_title(base, found), _towers(found), _sites(found.groups), _costs(found), *_unread(found)):
        console.print(part)


def _print_memory(train: str, batches: int, json: bool) -> None:
    from moadapt.cli.memory import MemoryEstimate, memory_table  # which is slow to import

    found = MemoryEstimate(train, batches)
    if json:
        print(json_format.dumps(found.memory.as_json(), indent=2))
    else:
        Console().print(memory_table(found, _bytes))


def _title(name: str, found: Inspection) -> str:
    settings = {key: value for key, value in found.adapter.items() if key not in ("name", "placement")}
    given = ", ".join(f"{key} {value}" for key, value in settings.items() if value is not None)
    where = {key: value for key, value in (found.adapter["placement"] or {}).items() if value != _ANYWHERE[key]}
    placed = ", ".join(f"{key} {value}" for key, value in where.items()) or "by default"
    return escape(
        f"base: {name}, a {found.base} of {found.parameters:,} parameters\n"
        f"adapter: {found.adapter['name']}, {given}\nplacement: {placed}"
    )


def _towers(found: Inspection) -> Table:
    table = Table(title="towers", title_justify="left")
    table.add_column("tower")
    table.add_column("module", overflow="fold")
    for column in ("blocks read", "adapted", "parameters", "added", "share"):
        table.add_column(column, justify="right", no_wrap=column != "adapted")
    for tower in found.towers:
        share = f"{tower.added / tower.parameters:.2%}" if tower.added else "-"
        blocks = (f"{tower.read} of {tower.blocks}", _ranges(tower.adapted)) if tower.blocks else ("-", "-")
        table.add_row(
            tower.name,
            "\n".join(tower.paths),
            *blocks,
            f"{tower.parameters:,}",
            f"{tower.added:,}" if tower.added else "-",
            share,
        )
    table.add_section()
    table.add_row(
        "all", "", "", "", f"{found.parameters:,}", f"{found.added:,}", f"{found.added / found.parameters:.2%}"
    )
    return table


def _sites(groups: Sequence[SiteGroup]) -> Table:
    table = Table(title="sites", title_justify="left")
    for column in ("form", "kind"):
        table.add_column(column)
    table.add_column("modules", min_width=24)
    for column in ("in, out", "sites", "adapted", "added"):
        table.add_column(column, justify="right", no_wrap=True)
    for tower, here in groupby(
        (group for group in groups if group.read or group.adapted), key=lambda group: group.tower
    ):
        table.add_section()
        table.add_row(f"[bold]{tower}[/bold]")
        for group in here:
            counts = [f"{number:,}" if number else "-" for number in (group.sites, group.adapted, group.added)]
            shape, style = "{}, {}".format(*group.shape), None if group.adapted else "dim"
            table.add_row(group.form, group.kind, ", ".join(group.modules), shape, *counts, style=style)
    return table


def _costs(found: Inspection) -> Table:
    table = Table(title="costs", title_justify="left", show_header=False)
    memory = found.memory
    training = memory.parameters + memory.gradients + memory.optimizer
    table.add_row(
        "memory to train it",
        f"{_bytes(training)}: parameters {_bytes(memory.parameters)}, gradients {_bytes(memory.gradients)}, "
        f"AdamW {_bytes(memory.optimizer)}",
    )
    for tower in found.towers:
        if tower.added:
            table.add_row(f"for each {tower.name} token", _per_token(tower))
    merged = "it cannot be merged" if memory.merged is None else "nothing once merged"
    table.add_row("memory in use", f"{_bytes(memory.parameters)}; {merged}")
    return table


def _per_token(tower: TowerReport) -> str:
    if tower.flops_per_token is None or tower.saved_per_token is None:
        return "depends on the input; not told"
    share = f", {tower.flops_per_token / tower.base_flops_per_token:.2%} more" if tower.base_flops_per_token else ""
    saved = f"at most {_bytes(tower.saved_per_token)} kept for backward"
    return f"{tower.flops_per_token:,} FLOPs in matrix products{share}; {saved}"


def _unread(found: Inspection) -> list[str]:
    if not found.unread:
        return []
    return ["computed but never read, skipped unless the placement says `unread: true`:", *found.unread]


def _ranges(numbers: tuple[int, ...]) -> str:
    """Write sorted numbers as ranges: 0-3, 5, 7-9."""
    if not numbers:
        return "none"
    breaks = [0, *(i + 1 for i, (a, b) in enumerate(pairwise(numbers)) if b != a + 1), len(numbers)]
    runs = [numbers[start:stop] for start, stop in pairwise(breaks)]
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


def _bytes(count: float) -> str:
    unit = 0
    while count >= 1000 and unit < len(_UNITS) - 1:
        count, unit = count / 1000, unit + 1
    return f"{count:.3g} {_UNITS[unit]}"
