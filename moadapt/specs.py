"""Specs as JSON: a spec is a frozen dataclass, stored as its registered name and its fields."""

from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from typing import Any, get_args

from moadapt.field_types import check_fields, hints_of
from moadapt.placement import Placement
from moadapt.registry import ROUTERS, Registry
from moadapt.router import RouterSpec


def to_json(spec: Any, registry: Registry) -> dict[str, Any]:
    """Return a spec's name and fields.

    Args:
        spec: A frozen dataclass.
        registry: Where its class is registered.
    """
    return {"name": registry.name_of(type(spec)), **fields_of(spec)}


def from_json(stored: Mapping[str, Any], registry: Registry) -> Any:
    """Build a spec from its name and fields; nothing is imported for it but registered packages.

    Args:
        stored: What `to_json` returned, or a user's `{name: top_k, k: 2}`.
        registry: Where to look the name up.

    Raises:
        ValueError: The name or a field is unknown, or a field is missing; all are listed with the accepted ones. Or
            the name is that of a class that was not imported yet.
    """
    given = dict(stored)
    name = given.pop("name", None)
    if not isinstance(name, str):
        raise ValueError(f"{dict(stored)} lacks the name of its {registry.kind}; write {{name: ..., field: value}}")
    part = registry.known(name)
    if not is_dataclass(part):
        raise ValueError(f"{name!r} is no {registry.kind}, whose specs are dataclasses; there are {registry.names()}")
    return bind(part, given)


def bind(part: type[Any], given: Mapping[str, Any]) -> Any:
    """Call a spec's class with fields read from a file.

    Raises:
        ValueError: Fields are unknown or missing; all are listed with the accepted ones. Or a value has another type
            than its field.
    """
    known = {field.name: field for field in fields(part) if field.init}
    unknown = sorted(set(given) - set(known))
    needed = {n for n, f in known.items() if f.default is MISSING and f.default_factory is MISSING}
    missing = sorted(needed - set(given))
    if unknown or missing:
        problems = [f"unknown: {', '.join(unknown)}"] * bool(unknown) + [f"missing: {', '.join(missing)}"] * bool(
            missing
        )
        raise ValueError(f"{part.__name__} got wrong fields ({'; '.join(problems)}); it accepts {', '.join(known)}")
    kinds = hints_of(part)
    values = {name: _value(name, value, kinds.get(name)) for name, value in given.items()}
    check_fields(part, values)
    return part(**values)


def _value(name: str, value: Any, kind: Any) -> Any:
    if RouterSpec in (kind, *get_args(kind)) and isinstance(value, str | Mapping):
        return from_json({"name": value} if isinstance(value, str) else value, ROUTERS)
    if name == "placement" and isinstance(value, str | Mapping):
        return placement_of(value)
    return tuple(value) if isinstance(value, list) else value


def placement_of(given: Mapping[str, Any] | str) -> Placement:
    """Return the placement that a file or a command line names or spells out.

    Args:
        given: Its name, or its fields.

    Raises:
        ValueError: The name or a field is unknown.
    """
    placement: Placement = Placement.named(given) if isinstance(given, str) else bind(Placement, given)
    return placement


def fields_of(spec: Any) -> dict[str, Any]:
    """Return a dataclass's fields as JSON values."""
    return {field.name: _plain(getattr(spec, field.name)) for field in fields(spec)}


def _plain(value: Any) -> Any:
    if isinstance(value, RouterSpec):
        return to_json(value, ROUTERS)
    if is_dataclass(value):
        return fields_of(value)
    if isinstance(value, Mapping):
        return {name: _plain(each) for name, each in value.items()}
    return list(value) if isinstance(value, tuple) else value
