"""Short names in configurations: `class_path: top_k` becomes the class's dotted path before anything is parsed.

A part is recognised by its key, wherever it stands: `router`, `shared`, `dataset`, `ranks`, `balance`, `sampling`,
`codec`, `view`, and the entries of `experts`, `tasks` and `objectives`. Its settings are checked here too, since the
class tells best what it accepts. A named `placement` becomes its fields.
"""

import difflib
import inspect
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

from moadapt.placement import Placement
from moadapt.registry import (
    BALANCES,
    CODECS,
    DATASETS,
    FAMILIES,
    OBJECTIVES,
    RANKS,
    ROUTERS,
    SAMPLERS,
    TASKS,
    VIEWS,
    Registry,
)
from moadapt.specs import fields_of

_PARTS = {
    "router": ROUTERS,
    "shared": FAMILIES,
    "dataset": DATASETS,
    "ranks": RANKS,
    "balance": BALANCES,
    "sampling": SAMPLERS,
    "codec": CODECS,
    "view": VIEWS,
}
_MAPS = {"experts": FAMILIES, "tasks": TASKS}
_LISTS = {"objectives": OBJECTIVES}
_PLACEMENT = "placement"
_PLAIN = "optimization"
"""Holds no parts, though kinds of parameters, such as `shared`, bear the names of some."""


def resolve(config: Any) -> Any:
    """Return a configuration with dotted paths in the place of short names.

    Args:
        config: What a YAML file holds, or a part of it.

    Raises:
        ValueError: A name or a setting of a part is unknown, or a part is a number; the accepted ones are listed.
    """
    if not isinstance(config, Mapping):
        return config
    resolved = {}
    for key, value in config.items():
        if key == _PLAIN:
            resolved[key] = value
        elif key in _PARTS and isinstance(value, str | Mapping):
            resolved[key] = _part(str(key), value, _PARTS[key])
        elif key in _PARTS and isinstance(value, int | float) and not isinstance(value, bool):
            registry = _PARTS[key]
            raise ValueError(f"{key} is {value}; name a {registry.kind}: {', '.join(registry.names())}")
        elif key in _MAPS and isinstance(value, Mapping):
            resolved[key] = {name: _part(f"{key}.{name}", part, _MAPS[key]) for name, part in value.items()}
        elif key == _PLACEMENT and isinstance(value, str) and value:
            resolved[key] = fields_of(Placement.named(value))
        elif key in _LISTS and isinstance(value, list):
            resolved[key] = [_part(f"{key}.{index}", part, _LISTS[key]) for index, part in enumerate(value)]
        else:
            resolved[key] = resolve(value)
    return resolved


def resolve_arguments(arguments: Sequence[str]) -> list[str]:
    """Return command-line arguments with dotted paths in the place of short names.

    Args:
        arguments: Such as `--model.router top_k` or `--model.experts.vqa=lora`.

    Raises:
        ValueError: A name, or a setting of a part that is named here, is unknown; the accepted ones are listed.
    """
    _check_options(arguments)
    resolved: list[str] = []
    spell: Callable[[str], str] | None = None
    for argument in arguments:
        option, separator, value = argument.partition("=")
        here = _speller_of(option) if option.startswith("--") else None
        if here is not None and separator:
            resolved.append(f"{option}={here(value)}")
        else:
            resolved.append(argument if spell is None else spell(argument))
        spell = here if not separator else None
    return resolved


def check_keys(section: str, given: Iterable[str], part: Callable[..., Any], without: Sequence[str] = ()) -> None:
    """Refuse keys that a class does not take.

    Args:
        section: Where they stand, for the message.
        given: The keys.
        part: The class.
        without: Settings that are not for the user to give here.

    Raises:
        ValueError: A key is unknown; near and accepted ones are listed.
    """
    accepted = [name for name in inspect.signature(part).parameters if name not in ("self", *without)]
    for key in given:
        if key.split(".")[0] not in accepted:
            near = difflib.get_close_matches(key, accepted, n=1)
            hint = f"did you mean {near[0]}? " if near else ""
            raise ValueError(f"{section} has no setting {key!r}; {hint}It accepts {', '.join(accepted)}")


def _part(section: str, value: Any, registry: Registry) -> Any:
    if isinstance(value, str):
        return _path(value, registry) if value not in ("", "null") else value
    if not isinstance(value, Mapping):
        return value
    if "class_path" not in value:  # settings of a part that an earlier file names
        return {**value, "init_args": resolve(value["init_args"])} if "init_args" in value else value
    settings = value.get("init_args") or {}
    extra = sorted(set(value) - {"class_path", "init_args", "dict_kwargs"})
    if extra:
        raise ValueError(f"{section} has {', '.join(extra)} beside class_path; put settings under init_args")
    check_keys(f"{section} ({value['class_path']})", settings, registry.get(value["class_path"]))
    full = {**value, "class_path": _path(value["class_path"], registry)}
    return full if "init_args" not in full else {**full, "init_args": resolve(settings)}


def _path(name: str, registry: Registry) -> str:
    part = registry.get(name)
    return f"{part.__module__}.{part.__qualname__}"


def _check_options(arguments: Sequence[str]) -> None:
    """Refuse `--model.router.kk` where `--model.router top_k` takes no `kk`."""
    joined = [f"{a}={b}" for a, b in pairwise([*arguments, "--"]) if a.startswith("--") and "=" not in a]
    pairs = [each.partition("=")[::2] for each in [*joined, *(a for a in arguments if a.startswith("--") and "=" in a)]]
    named = {option.removesuffix(".class_path"): value for option, value in pairs}
    for option, _ in pairs:
        part, _, key = option.removesuffix(".class_path").rpartition(".")
        part = part.removesuffix(".init_args")
        registry = _registry_of(part.removeprefix("--").split("."))
        name = named.get(part, "")
        if (
            registry is not None
            and key != "init_args"
            and name
            and not name.startswith(("{", "[", "-"))
            and name != "null"
        ):
            check_keys(f"{part.removeprefix('--')} ({name})", [key], registry.get(name))


def _in_text(value: str, spell: Callable[[str], str]) -> str:
    """Spell a bare name out; null, inline mappings and lists are left to the parser."""
    return value if value in ("", "null") or value.startswith(("{", "[", "-")) else spell(value)


def _speller_of(option: str) -> Callable[[str], str] | None:
    """Return what spells the value of an option out, if its key says that it names something."""
    keys = option.removeprefix("--").split(".")
    if keys[-1] == _PLACEMENT:
        return partial(_in_text, spell=lambda name: json.dumps(fields_of(Placement.named(name))))
    if keys[-1] == "class_path":
        keys = keys[:-1]
    registry = _registry_of(keys)
    return None if registry is None else partial(_in_text, spell=partial(_path, registry=registry))


def _registry_of(keys: Sequence[str]) -> Registry | None:
    """Return where the part at a key is registered; None where there is no part."""
    inside = _MAPS.get(keys[-2]) if len(keys) > 1 else None
    return inside or _PARTS.get(keys[-1]) or _LISTS.get(keys[-1].removesuffix("+"))
