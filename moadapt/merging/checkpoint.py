"""The weights of a base in its folder: what is in which file, read one at a time, and how new files are filled."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

INDEX, WHOLE = "model.safetensors.index.json", "model.safetensors"
_WEIGHTS = (".safetensors", ".bin", ".index.json", ".pt", ".pth", ".h5", ".msgpack", ".gguf")


@dataclass(frozen=True)
class Stored:
    """One tensor of a checkpoint.

    Args:
        key: Its name in the file.
        name: The parameter or buffer that it is in the base.
        file: Where it is.
        shape: Its shape.
        bytes: What it takes there.
    """

    key: str
    name: str
    file: Path
    shape: tuple[int, ...]
    bytes: int

    def read(self) -> Tensor:
        """Return a copy that holds no file open."""
        with safe_open(self.file, framework="pt") as opened:
            return opened.get_tensor(self.key).clone()  # type: ignore[no-any-return]


class Checkpoint:
    """A base's folder with safetensors.

    Args:
        folder: That `from_pretrained` reads.
        base: The same base on the meta device.

    Raises:
        ValueError: There are no safetensors, they cannot be read, or hold a parameter in another form or not at all.
    """

    def __init__(self, folder: Path, base: PreTrainedModel) -> None:
        self.folder, self._base = folder, base
        self.tensors = self._found()
        held = {each.name: each.shape for each in self.tensors}
        for name, parameter in base.named_parameters():
            if held.get(name) != tuple(parameter.shape):
                raise ValueError(
                    f"{folder} holds {name} as {held.get(name)}, but the base has {tuple(parameter.shape)} there; "
                    "merge in memory, without streaming"
                )

    def shards(self, size: int) -> list[list[Stored]]:
        """Cut the tensors, in their order, into lists that take so many bytes at most, or hold one tensor.

        Args:
            size: In bytes.
        """
        found: list[list[Stored]] = [[]]
        for each in self.tensors:
            if found[-1] and sum(other.bytes for other in found[-1]) + each.bytes > size:
                found.append([])
            found[-1].append(each)
        return found

    def others(self) -> list[Path]:
        """Return the files of the folder that hold no weights."""
        return [file for file in sorted(self.folder.iterdir()) if file.is_file() and not file.name.endswith(_WEIGHTS)]

    def state(self) -> list[Any]:
        """Return what tells whether the files are still the same."""
        told = {each.file: each.file.stat() for each in self.tensors}
        return [[file.name, stat.st_size, stat.st_mtime_ns] for file, stat in sorted(told.items())]

    def _found(self) -> list[Stored]:
        index, whole = self.folder / INDEX, self.folder / WHOLE
        try:
            if index.is_file():
                names = dict.fromkeys(json.loads(index.read_text())["weight_map"].values())
                return [each for name in names for each in self._in(self.folder / name)]
            if whole.is_file():
                return self._in(whole)
        except (OSError, KeyError, ValueError, SafetensorError) as error:
            raise ValueError(f"the weights in {self.folder} cannot be read: {error}") from error
        raise ValueError(f"{self.folder} holds neither {INDEX} nor {WHOLE}; give a base as a folder with safetensors")

    def _in(self, file: Path) -> list[Stored]:
        found = []
        with safe_open(file, framework="pt") as opened:
            for key in opened.keys():  # noqa: SIM118, no mapping
                part = opened.get_slice(key)
                shape = tuple(part.get_shape())
                found.append(Stored(key, self._name(key), file, shape, prod(shape) * _width(part.get_dtype())))
        return found

    def _name(self, key: str) -> str:
        renamings, converters, held = self._conversions
        name, converted = rename_source_key(key, renamings, converters, self._base.base_model_prefix, held)
        if converted is not None:
            raise ValueError(
                f"{key} is stored in another form than transformers holds it in ({name}); merge in memory, without "
                "streaming"
            )
        return name

    @cached_property
    def _conversions(self) -> tuple[list[WeightRenaming], list[WeightConverter], dict[str, Any]]:
        found: Sequence[Any] = get_model_conversion_mapping(self._base)
        renamings = [each for each in found if isinstance(each, WeightRenaming)]
        return renamings, [each for each in found if isinstance(each, WeightConverter)], self._base.state_dict()


def _width(dtype: str) -> int:
    """Return how many bytes a number takes, by the name of its type in safetensors."""
    return {"BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1}.get(dtype) or max(1, int("".join(filter(str.isdigit, dtype))) // 8)


def bytes_of(size: str) -> int:
    """Read a size such as `1GB` or `500MB`.

    Args:
        size: A number and a unit.

    Raises:
        ValueError: It is neither.
    """
    units = {"KB": 10**3, "MB": 10**6, "GB": 10**9}
    number, unit = size.strip()[:-2], size.strip()[-2:].upper()
    try:
        found = int(float(number) * units[unit])
    except (KeyError, ValueError):
        raise ValueError(f"a size is {size!r}; write a number and KB, MB or GB, such as 1GB") from None
    if found < 1:
        raise ValueError(f"a size is {size!r}; give more than nothing")
    return found


def as_type(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    """Return a tensor in a number type, where it holds floating-point numbers and one is given.

    Args:
        tensor: Any.
        dtype: The type.
    """
    return tensor if dtype is None or not tensor.is_floating_point() else tensor.to(dtype)
