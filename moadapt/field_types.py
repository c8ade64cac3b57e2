"""Whether a value from a file or a command line has the type that a spec's field is annotated with."""

import types
from collections.abc import Mapping, Sequence
from dataclasses import is_dataclass
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

_PLAIN: dict[Any, str] = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text",
    types.NoneType: "null",
}


def check_fields(part: type[Any], given: Mapping[str, Any]) -> None:
    """Refuse values of another type than that of their fields; types that are not plain ones are left to the part.

    Args:
        part: A dataclass.
        given: Values by field.

    Raises:
        ValueError: A value has another type; field, value and what is accepted are told.
    """
    hints = hints_of(part)
    for name, value in given.items():
        if not _fits(value, hints.get(name, Any)):
            raise ValueError(f"{part.__name__} got {name}={value!r}; give {_told(hints[name])}")


def hints_of(part: type[Any]) -> dict[str, Any]:
    """Return the annotations of a dataclass's fields; none where they cannot be read.

    Args:
        part: A dataclass.
    """
    try:
        return get_type_hints(part)
    except NameError:  # names that only a type checker imports
        return {}


def _fits(value: Any, kind: Any) -> bool:
    origin, inside = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        return any(_fits(value, each) for each in inside)
    if origin is Literal:
        return any(type(value) is type(each) for each in inside)  # the part tells which values it takes
    if kind in _PLAIN:
        return type(value) in ((int, float) if kind is float else (kind,))
    if origin is tuple or origin is list:
        return isinstance(value, list | tuple) and _all_fit(value, inside)
    if isinstance(kind, type) and is_dataclass(kind):
        return isinstance(value, kind)
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return isinstance(value, Mapping) and all(_fits(k, inside[0]) and _fits(v, inside[1]) for k, v in value.items())
    return True


def _all_fit(values: Sequence[Any], kinds: tuple[Any, ...]) -> bool:
    if len(kinds) == 1 or kinds[1:] == (...,):
        return all(_fits(value, kinds[0]) for value in values)
    return len(values) == len(kinds) and all(_fits(*pair) for pair in zip(values, kinds, strict=True))


def _told(kind: Any) -> str:
    origin, inside = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        return " or ".join(_told(each) for each in inside)
    if origin is Literal:
        return " or ".join(map(repr, inside))
    if origin is tuple and inside[1:] != (...,):
        return f"a list of {len(inside)}: {', '.join(_told(each) for each in inside)}"
    if origin in (tuple, list):
        return f"a list, each {_told(inside[0])}"
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return f"a mapping, each {_told(inside[1])}"
    return _PLAIN[kind] if kind in _PLAIN else str(getattr(kind, "__name__", kind))
