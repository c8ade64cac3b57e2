"""`moadapt list`: the parts that can be chosen by short name."""

import dataclasses
import inspect
from typing import Any

from rich.console import Console
from rich.table import Table

from moadapt import registry
from moadapt.registry import Registry

KINDS: dict[str, Registry] = {
    "routers": registry.ROUTERS,
    "families": registry.FAMILIES,
    "initials": registry.INITIALS,
    "ranks": registry.RANKS,
    "samplers": registry.SAMPLERS,
    "tasks": registry.TASKS,
    "merges": registry.MERGES,
    "objectives": registry.OBJECTIVES,
    "balances": registry.BALANCES,
    "bases": registry.BASES,
    "datasets": registry.DATASETS,
    "metrics": registry.TEXT_METRICS,
    "codecs": registry.CODECS,
    "views": registry.VIEWS,
}


def list_parts(kind: str | None = None) -> None:
    """List parts with what they are and the settings they take.

    Args:
        kind: routers, families, initials, ranks, samplers, tasks, merges, objectives, balances, bases, datasets,
            metrics, codecs or views; all by default.

    Raises:
        ValueError: There is no such kind.
    """
    if kind is not None and kind not in KINDS:
        raise ValueError(f"there is no list of {kind!r}; there are {', '.join(KINDS)}")
    for name in [kind] if kind else KINDS:
        table = Table("name", "what it is", "settings", title=name, title_justify="left")
        for short, part in KINDS[name]:
            table.add_row(short, _first_line(part), _settings(part))
        Console().print(table)


def _first_line(part: type[Any]) -> str:
    return (inspect.getdoc(part) or "").split("\n")[0]


def _settings(part: type[Any]) -> str:
    if not dataclasses.is_dataclass(part):
        return ""
    return ", ".join(_setting(field) for field in dataclasses.fields(part) if field.init)


def _setting(field: "dataclasses.Field[Any]") -> str:
    if field.default is dataclasses.MISSING:
        return field.name if field.default_factory is dataclasses.MISSING else f"{field.name}={field.default_factory()}"
    value = "null" if field.default is None else field.default
    return f"{field.name}={value:.3g}" if isinstance(value, float) else f"{field.name}={value}"
