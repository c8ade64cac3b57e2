"""A `.bin` file that somebody else wrote with `torch.save`: read without running anything that it brings.

torch's own reading with `weights_only` calls no foreign function. Before that, the archive is looked through: it must
be uncompressed, as torch writes it, so that it unpacks to no more than its size, and its pickle may name only what
tensors are rebuilt by. Afterwards no tensor may be larger than what is stored of it.
"""

import pickletools
import re
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moadapt.hub.stored_tensor import StoredTensor

_LONGEST = 2**20
"""Bytes of the pickle, which holds names and shapes alone; some 6,000 tensors."""
_RECORD = re.compile(r"/data/[^/]+$")
_NAMES = {"collections OrderedDict", "torch._utils _rebuild_tensor_v2", "torch._utils _rebuild_parameter"}


def open_pickled(file: Path) -> dict[str, StoredTensor]:
    """Return the tensors of a file by name, mapped into memory and not read.

    Args:
        file: Which.

    Raises:
        ValueError: It is no archive of tensors, or holds anything else.
    """
    pickle, sizes = _contents(file)
    _check_pickle(file, pickle)
    try:
        found = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # a broken pickle may raise anything
        raise ValueError(f"{file.name} cannot be read as tensors: {type(error).__name__}: {error}") from error
    if not isinstance(found, dict) or not all(isinstance(name, str) for name in found):
        raise ValueError(f"{file.name} holds {type(found).__name__}, but must hold tensors by name")
    stored = {name: _stored(file, name, value) for name, value in found.items()}
    storages = {value.untyped_storage().data_ptr(): value.untyped_storage().nbytes() for value in found.values()}
    if sorted(size for size in storages.values() if size) != sizes:  # torch itself would read beyond a record
        raise ValueError(f"{file.name} says of its tensors that they have other sizes than are stored")
    return stored


def _contents(file: Path) -> tuple[bytes, list[int]]:
    """Return the pickle within an archive that does not grow when it is unpacked, and the sizes of its records."""
    try:
        with zipfile.ZipFile(file) as archive:
            entries = archive.infolist()
            packed = [entry.filename for entry in entries if entry.compress_type != zipfile.ZIP_STORED]
            whole = sum(entry.file_size for entry in entries)
            if packed or whole > file.stat().st_size:
                raise ValueError(
                    f"{file.name} is compressed (such as {(packed or ['its entries'])[0]!r}), as torch never writes "
                    "it, and could unpack to any size; ask for a safetensors file"
                )
            pickles = [entry for entry in entries if entry.filename.endswith("/data.pkl")]
            if len(pickles) != 1 or pickles[0].file_size > _LONGEST:
                raise ValueError(
                    f"{file.name} has {len(pickles)} pickles of {[p.file_size for p in pickles]} bytes; it must have "
                    f"one of at most {_LONGEST}, else ask for a safetensors file"
                )
            records = [entry.file_size for entry in entries if _RECORD.search(entry.filename)]
            return archive.read(pickles[0]), sorted(size for size in records if size)
    except (EOFError, NotImplementedError, OSError, RuntimeError, zipfile.BadZipFile) as error:
        raise ValueError(
            f"{file.name} is no archive as torch writes it since version 1.6 ({error}); ask for a safetensors file"
        ) from error


def _check_pickle(file: Path, pickle: bytes) -> None:
    """Refuse a pickle that names anything but what tensors are rebuilt by."""
    try:
        for code, value, _ in pickletools.genops(pickle):
            if code.name == "GLOBAL" and _is_harmless(str(value)):
                continue
            if code.name in ("GLOBAL", "STACK_GLOBAL", "INST", "OBJ", "NEWOBJ", "NEWOBJ_EX", "EXT1", "EXT2", "EXT4"):
                raise ValueError(
                    f"{file.name} would run {value or code.name!r}, which no tensor needs; do not load it anywhere"
                )
    except (IndexError, UnicodeDecodeError) as error:
        raise ValueError(f"{file.name} holds a broken pickle: {error}") from error


def _is_harmless(name: str) -> bool:
    module, _, own = name.partition(" ")
    return name in _NAMES or (module == "torch" and own.endswith("Storage") and own.isidentifier())


def _stored(file: Path, name: str, value: Any) -> StoredTensor:
    if not isinstance(value, Tensor) or value.layout != torch.strided:
        raise ValueError(f"{file.name} holds {name!r}, which is no plain tensor but {type(value).__name__}")
    value = value.detach()
    if value.numel() * value.element_size() > value.untyped_storage().nbytes():
        raise ValueError(f"{file.name} says that {name!r} has shape {tuple(value.shape)}, but stores less than that")
    return StoredTensor(tuple(value.shape), str(value.dtype).removeprefix("torch."), lambda: value)
