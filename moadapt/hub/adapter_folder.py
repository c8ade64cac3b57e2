"""Files of an adapter that somebody else wrote: which of a folder count, and that none lies elsewhere."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moadapt.hub.pickled_file import open_pickled
from moadapt.hub.safetensors_file import open_safetensors
from moadapt.hub.stored_tensor import StoredTensor

CONFIG, TENSORS, PICKLED = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
_INDEX = ".index.json"
_LONGEST = 2**20
"""Bytes of a configuration or an index; that of an export with a pattern for each of 10,000 modules has less."""
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


@dataclass(frozen=True)
class AdapterFiles:
    """What a folder holds.

    Args:
        folder: Which.
        config: What `adapter_config.json` says; None where there is none.
        tensors: By the names that they have in the files.
        metadata: What a safetensors file says of itself.
    """

    folder: Path
    config: Mapping[str, Any] | None
    tensors: Mapping[str, StoredTensor]
    metadata: Mapping[str, str] = field(default_factory=dict)


def find_folder(reference: str | Path) -> Path:
    """Return the folder or file that a reference names; one by hub name is fetched, its files of adapters alone.

    Args:
        reference: A folder, a `.safetensors` file, or a hub name such as `owner/name`.

    Raises:
        ValueError: There is none such.
    """
    path = Path(reference)
    if path.exists():
        return path
    if not _HUB_NAME.fullmatch(str(reference)):
        raise ValueError(f"there is no folder {reference}; give one, or a hub name such as owner/name")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(str(reference), allow_patterns=[CONFIG, "*.safetensors", "*.bin", "*" + _INDEX]))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        raise ValueError(
            f"there is no folder {reference}, and no such adapter could be fetched from the hub: {error}"
        ) from error


def open_folder(path: Path) -> AdapterFiles:
    """Open the files of an adapter; no tensor is read yet.

    Args:
        path: Of the folder, or of one `.safetensors` file as kohya's and diffusers' trainers write it.

    Raises:
        ValueError: A file is missing, broken, lies outside, or is no honest one; the message says which and why.
    """
    if path.is_file():
        if path.suffix != ".safetensors":
            raise ValueError(f"{path} is a file, but neither a folder nor .safetensors; give one of these")
        return AdapterFiles(path.parent, None, *open_safetensors(path))
    if not path.is_dir():
        raise ValueError(f"{path} is no folder; give one that holds {CONFIG}")
    config = None
    if (path / CONFIG).exists() or (path / CONFIG).is_symlink():
        config = read_json(_within(path, CONFIG))
    return AdapterFiles(path, config, *_tensors(path, with_config=config is not None))


def read_json(file: Path) -> dict[str, Any]:
    """Read a mapping from a small JSON file.

    Args:
        file: Which.

    Raises:
        ValueError: It is none, or too long.
    """
    try:
        size = file.stat().st_size
        if not file.is_file() or size > _LONGEST:
            raise ValueError(f"{file.name} has {size} bytes; it must be a file of at most {_LONGEST}")
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, RecursionError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{file.name} cannot be read as JSON: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{file.name} holds a {type(found).__name__}, but must hold a mapping")
    return found


def _tensors(folder: Path, *, with_config: bool) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    """Open the one file of tensors, or all parts of a divided one."""
    for name, read in ((TENSORS, open_safetensors), (PICKLED, _open_pickled)):
        if _names(folder, name):
            return read(_within(folder, name))
        if _names(folder, name + _INDEX):
            return _parts(folder, name + _INDEX, read)
    alone = sorted(entry.name for entry in folder.iterdir() if entry.suffix == ".safetensors")
    if not with_config and len(alone) == 1:
        return open_safetensors(_within(folder, alone[0]))
    missing = TENSORS if with_config else f"{CONFIG}, {TENSORS}"
    raise ValueError(f"{folder} lacks {missing}, and it must be there (or {PICKLED}) for this to be an adapter")


def _parts(folder: Path, index: str, read: Any) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    places = read_json(_within(folder, index)).get("weight_map")
    if not isinstance(places, dict) or not places or not all(isinstance(part, str) for part in places.values()):
        raise ValueError(f"{index} lacks a weight_map of files by tensor")
    found: dict[str, StoredTensor] = {}
    metadata: dict[str, str] = {}
    for part in sorted(set(places.values())):
        own, said = read(_within(folder, part))
        wrong = sorted(own.keys() ^ {name for name, place in places.items() if place == part})
        if wrong:
            raise ValueError(f"{part} and {index} disagree about {len(wrong)} tensors, such as {wrong[0]!r}")
        found |= own
        metadata |= said
    return found, metadata


def _open_pickled(file: Path) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    return open_pickled(file), {}


def _names(folder: Path, name: str) -> bool:
    return (folder / name).exists() or (folder / name).is_symlink()


def _within(folder: Path, name: str) -> Path:
    """Return a file's own path; a link may lead elsewhere in the folder, or to the store of the hub's cache.

    Raises:
        ValueError: It leads elsewhere, or nowhere.
    """
    if Path(name).name != name or name in ("", ".", ".."):
        raise ValueError(f"{folder} names a file {name!r}, which is a path; files of an adapter lie in its folder")
    try:
        real = (folder / name).resolve(strict=True)
    except (OSError, RuntimeError, ValueError) as error:
        raise ValueError(f"{folder} has no file {name}: {error}") from error
    allowed = [folder.resolve()]
    if folder.parent.name == "snapshots":
        allowed.append(folder.resolve().parent.parent / "blobs")
    if real.parent not in allowed or not real.is_file():
        raise ValueError(
            f"{folder / name} leads to {real}, outside of its folder or no file; copy the file itself there"
        )
    return real
