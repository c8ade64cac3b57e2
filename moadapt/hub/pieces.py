"""The tensors of a foreign adapter, sorted by the module of the base that they belong to."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from moadapt.hub.diagnosis import Fate, Findings
from moadapt.hub.key_names import ParsedKey, parse_key
from moadapt.hub.module_names import ModuleNames
from moadapt.hub.stored_tensor import StoredTensor

_MOST = 8
"""Tensors for each module of a base; a LoRA has two to four."""


@dataclass
class Pieces:
    """What a file has for one module.

    Args:
        path: Of the module in the base.
        written: Its path as the file has it.
        keys: Names in the file by part.
        tensors: By part.
    """

    path: str
    written: str
    keys: dict[str, str] = field(default_factory=dict)
    tensors: dict[str, StoredTensor] = field(default_factory=dict)

    @property
    def fate(self) -> Fate:
        """`mapped` or `renamed`."""
        return "mapped" if self.path == self.written else "renamed"

    def names(self, *parts: str) -> list[str]:
        """Return the names in the file of some parts, by default of all."""
        return [key for part, key in self.keys.items() if not parts or part in parts]

    def has(self, *parts: str) -> bool:
        """Tell whether any of these parts is there."""
        return any(part in self.tensors for part in parts)

    def shape(self, part: str) -> tuple[int, ...]:
        """Return the shape of a part."""
        return self.tensors[part].shape

    def read(self, part: str, shape: tuple[int, ...] | None = None) -> Tensor:
        """Return a part.

        Args:
            part: Which.
            shape: What it must be; None takes any.

        Raises:
            ValueError: It has another shape, is no tensor of floating-point numbers, or holds one that is not finite.
        """
        stored, key = self.tensors[part], self.keys[part]
        if shape is not None and stored.shape != shape:
            raise ValueError(f"{key} has shape {stored.shape}, where {self.path} needs {shape}")
        if not stored.is_float:
            raise ValueError(f"{key} holds {stored.dtype}; an adapter's tensors are floating-point numbers")
        found = stored.read()
        if not bool(torch.isfinite(found).all()):
            raise ValueError(f"{key} holds numbers that are not finite (NaN or infinite)")
        return found


def sort_pieces(tensors: Mapping[str, StoredTensor], names: ModuleNames, findings: Findings) -> dict[str, Pieces]:
    """Sort tensors by module; what has no place is refused there.

    Args:
        tensors: By name in the file.
        names: Of the base's modules.
        findings: Takes the fates of keys that are refused.
    """
    found: dict[str, Pieces] = {}
    most = _MOST * names.count
    if len(tensors) > most:
        findings.refusals.append(f"it holds {len(tensors)} tensors, for a base of {names.count} modules")
        return found
    if not tensors:
        findings.refusals.append("it holds no tensor")
    adapters: set[str] = set()
    for key in tensors:
        try:
            parsed = parse_key(key)
            path = names.find(parsed.path)
        except ValueError as error:
            findings.refuse([key], str(error))
            continue
        adapters |= {parsed.adapter} if parsed.adapter else set()
        _add(found.setdefault(path, Pieces(path, parsed.path)), key, parsed, tensors[key], findings)
    if len(adapters) > 1:
        findings.refusals.append(f"it holds several adapters, {', '.join(sorted(adapters))}; ask for a file of each")
    return found


def _add(own: Pieces, key: str, parsed: ParsedKey, tensor: StoredTensor, findings: Findings) -> None:
    if parsed.part in own.keys:
        findings.refuse([key], f"{own.keys[parsed.part]} is the same tensor of {own.path}", own.path)
        return
    own.keys[parsed.part] = key
    own.tensors[parsed.part] = tensor
