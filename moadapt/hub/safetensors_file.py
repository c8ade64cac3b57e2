"""A safetensors file that somebody else wrote.

The library checks offsets, sizes and types against the length of the file. What it does not mind is checked here: a
header too long to be one of an adapter, and a name that stands there twice, of which it would take the last.
"""

import json
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from moadapt.hub.stored_tensor import StoredTensor

_LONGEST = 10 * 2**20
"""Bytes of a header; an adapter of 30,000 tensors has half of it."""
_TYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def open_safetensors(file: Path) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    """Return the tensors of a file by name, none of them read yet, and its metadata.

    Args:
        file: Which.

    Raises:
        ValueError: It is no safetensors file, or one that no honest writer makes.
    """
    _check_header(file)
    try:
        opened: Any = safe_open(file, framework="pt")
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{file.name} is no whole safetensors file: {error}") from error
    found = {}
    for name in opened.keys():  # noqa: SIM118, it is no mapping
        tensor = opened.get_slice(name)
        kind = tensor.get_dtype()
        found[name] = StoredTensor(tuple(tensor.get_shape()), _TYPES.get(kind, kind), partial(opened.get_tensor, name))
    return found, dict(opened.metadata() or {})


def _check_header(file: Path) -> None:
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        if length > _LONGEST:
            raise ValueError(
                f"{file.name} says that its header has {length} bytes; an adapter's has at most {_LONGEST}"
            )
        header = opened.read(length)
    try:
        json.loads(header, object_pairs_hook=_once)
    except (RecursionError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{file.name} is no safetensors file: its header is no JSON ({error})") from error


def _once(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """Build a mapping, and refuse a name that stands in it twice.

    Raises:
        ValueError: One does.
    """
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"the file names {name!r} twice; it is not known which of the two counts")
        found[name] = value
    return found
