"""Which base a mixture belongs to: told by names, shapes and samples of its parameters."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import PreTrainedModel

from moadapt.quantised import dequantised, is_quantised

_SAMPLES = 16
_NOTED: "WeakKeyDictionary[PreTrainedModel, dict[str, str]]" = WeakKeyDictionary()
"""Of bases that were read while their weights were there."""


def fingerprint(base: PreTrainedModel) -> dict[str, str]:
    """Identify a base by the names and shapes of its parameters and by samples of their values.

    Values are rounded to bfloat16, so that a base loaded in float32 or bfloat16 is the same base. Of quantised weights
    the values count that they stand for, so that a quantised base is another base than the one it was made from.

    Args:
        base: The base, without a mixture on it; on the meta device it has no values.
    """
    if base in _NOTED:
        return _NOTED[base]
    weights = {name: _plain(base, name, parameter) for name, parameter in base.named_parameters()}
    return of_samples(base, {name: b"" if weight.is_meta else sampled(weight) for name, weight in weights.items()})


def sampled(weight: Tensor) -> bytes:
    """Return what of a parameter's values identifies it.

    Args:
        weight: Of any shape.
    """
    flat = weight.detach().flatten()
    count = min(_SAMPLES, len(flat))
    picked = flat[[i * (len(flat) - 1) // max(count - 1, 1) for i in range(count)]]
    return picked.to(torch.bfloat16).view(torch.int16).cpu().numpy().tobytes()


def of_samples(base: PreTrainedModel, samples: Mapping[str, bytes]) -> dict[str, str]:
    """Identify a base by its names and shapes, and by values that were read elsewhere.

    Args:
        base: The base, which may lie on the meta device.
        samples: What `sampled` gives, by name of the parameter.
    """
    structure, values = hashlib.sha256(), hashlib.sha256()
    for name, parameter in sorted(base.named_parameters()):
        weight = _plain(base, name, parameter)
        structure.update(f"{name}{tuple(weight.shape)}".encode())
        values.update(samples[name])
    return {"class": type(base).__name__, "structure": structure.hexdigest(), "values": values.hexdigest()}


def note_fingerprint(base: PreTrainedModel) -> None:
    """Remember a base as it is, as before its weights are spread over processes, where none has them all.

    Args:
        base: The base, without a mixture on it; it must not change any more.
    """
    _NOTED[base] = fingerprint(base)


def _plain(base: PreTrainedModel, name: str, parameter: Tensor) -> Tensor:
    """Return a parameter, a quantised weight as the numbers that it stands for."""
    path, _, last = name.rpartition(".")
    module = base.get_submodule(path)
    return dequantised(module) if last == "weight" and is_quantised(module) else parameter


def check_base(file: Path, stored: Mapping[str, str], base: PreTrainedModel) -> None:
    """Refuse another base than the one that was stored.

    Args:
        file: Where it was.
        stored: Its fingerprint and its name.
        base: The base given, without a mixture on it.

    Raises:
        ValueError: It is another one; the message says what differs.
    """
    check_fingerprint(file, stored, fingerprint(base))


def check_fingerprint(file: Path, stored: Mapping[str, str], own: Mapping[str, str]) -> None:
    """Refuse another base than the one that was stored.

    Args:
        file: Where it was.
        stored: Its fingerprint and its name.
        own: Fingerprint of the base given; parts that are not there are not compared.

    Raises:
        ValueError: It is another one; the message says what differs.
    """
    if not isinstance(stored, Mapping):
        raise ValueError(f"{file} names no base, but has {stored!r} there")
    for part, what in (("class", "another class"), ("structure", "other parameters"), ("values", "other weights")):
        if part in own and stored.get(part) != own[part]:
            raise ValueError(
                f"{file.parent} was trained on {stored.get('name')!r} ({stored.get('class')}); the base given, a "
                f"{own['class']}, has {what}; load the base it was trained on, quantised if it was"
            )
