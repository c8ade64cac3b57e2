"""Several configuration files as one: they are laid over each other key by key, and later ones win.

Tasks and experts of all files come together. One that is null in a later file is left out, and a part of another class
replaces the earlier one with its settings.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from moadapt.cli.parser_messages import tidied

_OPTIONS = ("-c", "--config")
_ENTRIES = ("experts", "tasks")


def config_files(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Part the configuration files that a command line names from its other arguments.

    Args:
        arguments: As typed.

    Returns:
        The files, and the others.
    """
    files, others, expected = [], [], False
    for argument in arguments:
        option, given, value = argument.partition("=")
        if expected or (given and option in _OPTIONS):
            files.append(argument if expected else value)
            expected = False
        elif argument in _OPTIONS:
            expected = True
        else:
            others.append(argument)
    return files, others + ["--config"] * expected


def layered(arguments: Sequence[str], load: Callable[[str], Any]) -> list[str]:
    """Return a command line with one configuration in the place of several files; other options win over it.

    Args:
        arguments: A command and its options.
        load: Reads a file's text, with dotted paths in the place of short names.

    Raises:
        ValueError: A file cannot be used, or takes out what no earlier one has.
    """
    files, others = config_files(arguments)
    if len(files) < 2 or not all(Path(file).is_file() for file in files):
        return list(arguments)  # the parser reads one file itself, and tells of those that are missing
    config: Any = {}
    for file in files:
        config = _over("", config, _read(file, load))
    plain = json.loads(json.dumps(config))  # no tuples
    return [others[0], f"--config={yaml.safe_dump(plain, sort_keys=False)}", *others[1:]]


def _read(file: str, load: Callable[[str], Any]) -> Mapping[str, Any]:
    try:
        config = load(Path(file).read_text(encoding="utf-8"))
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError(f"{file}: {tidied(str(error), [file])}") from error
    if not isinstance(config, Mapping | None):
        raise ValueError(f"{file} holds {config!r}; give sections such as trainer, model and data")
    return config or {}


def _over(section: str, below: Any, above: Any) -> Any:
    """Lay a value over another."""
    if isinstance(above, Mapping) and isinstance(below, str) and set(above) == {"init_args"}:
        below = {"class_path": below}
    if not isinstance(above, Mapping):
        return above
    kept = dict(below) if isinstance(below, Mapping) and not _another(below, above) else {}
    for key, value in above.items():
        if value is None and section.rpartition(".")[2] in _ENTRIES:
            if key not in kept:
                raise ValueError(f"{section}.{key} is null, and no earlier file gives it; there are {', '.join(kept)}")
            del kept[key]
        else:
            kept[key] = _over(f"{section}.{key}" if section else key, kept.get(key), value)
    return kept


def _another(below: Mapping[str, Any], above: Mapping[str, Any]) -> bool:
    """Tell whether a part is of another class than the one below it."""
    return "class_path" in above and above["class_path"] != below.get("class_path", above["class_path"])
