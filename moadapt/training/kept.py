"""The checkpoints of a run: `last.ckpt`, before it `last-1.ckpt` and so on, so that a broken one is no lost run."""

import io
import logging
import os
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from moadapt.whole_files import beside, put

LAST = "last.ckpt"
_NAME = re.compile(r"last(?:-([1-9]\d*))?\.ckpt")
_PARTS = ("global_step", "loops", "optimizer_states", "state_dict")
_LOG = logging.getLogger(__name__)


def read_checkpoint(file: Path, **options: Any) -> dict[str, Any]:
    """Read a checkpoint that Lightning wrote: tensors and plain values.

    Such a file is a pickle, but with `weights_only` nothing in it is run: whatever is no tensor and no plain value is
    an error, so that the file may come from anybody.

    Args:
        file: Such as the `last.ckpt` of a run.
        options: Of `torch.load`, such as `map_location`.
    """
    found: dict[str, Any] = torch.load(file, weights_only=True, **options)
    return found


def fault(file: Path) -> str | None:
    """Return what is wrong with a checkpoint, in words, or None; every byte is read, against its checksum.

    Args:
        file: One that is there.
    """
    try:
        with zipfile.ZipFile(file) as archive:  # which torch writes, but does not check
            broken = archive.testzip()
        if broken is not None:
            return f"the checksum of {broken} in it is wrong"
        found = read_checkpoint(file, mmap=True, map_location="meta")
    except Exception as error:  # whatever damaged bytes make of zipfile, zlib and torch, the file cannot be read
        return (str(error).strip().splitlines() or [type(error).__name__])[0]
    lacking = [part for part in _PARTS if not isinstance(found, dict) or part not in found]
    return f"it is no checkpoint of a run: {', '.join(lacking)} is not in it" if lacking else None


def listed(folder: Path) -> list[Path]:
    """Return the checkpoints of a folder, the newest first, whole or not.

    Args:
        folder: Of a run; may be missing.
    """
    names = [found for file in folder.glob("last*.ckpt") if (found := _NAME.fullmatch(file.name))]
    return [folder / found.string for found in sorted(names, key=lambda found: int(found[1] or 0))]


def newest(folder: Path) -> Path | None:
    """Return the newest checkpoint that is whole, warning of newer ones that are not; None where there is none at all.

    Args:
        folder: Of a run; may be missing.

    Raises:
        ValueError: There are some, and all are broken.
    """
    faults: dict[Path, str] = {}
    for file in listed(folder):
        found = fault(file)
        if found is None:
            for broken, why in faults.items():
                _LOG.warning("%s is broken (%s); going on from %s, the one before", broken, why, file.name)
            return file
        faults[file] = found
    if faults:
        told = "; ".join(f"{file} is broken ({why})" for file, why in faults.items())
        raise ValueError(
            f"{told}. There is nothing whole to go on from: put a copy of a checkpoint there, or remove what is broken "
            "to start over"
        )
    return None


class Kept:
    """Writes the checkpoints of a run, and keeps the last ones.

    Args:
        folder: Where.
        keep: How many, at least 1; while one is written there is one more.

    Raises:
        ValueError: `keep` is out of range.
    """

    def __init__(self, folder: Path, keep: int) -> None:
        if keep < 1:
            raise ValueError(f"keep is {keep}; give at least 1")
        self.files = [folder / (f"last-{age}.ckpt" if age else LAST) for age in range(keep)]
        self._stale: list[Path] = []

    def start(self, path: Path | None) -> None:
        """Have the next write drop what does not lead up to where training starts: broken files, and other runs'.

        Args:
            path: The checkpoint that was loaded, if any.
        """
        found = listed(self.files[0].parent)
        loaded = [file for file in found if path is not None and file.samefile(path)]
        earlier = found[found.index(loaded[0]) :] if loaded else []
        self._stale = [file for file in found if file not in earlier or file not in self.files]

    def write(self, checkpoint: Mapping[str, Any]) -> None:
        """Write the newest checkpoint; the others grow one older once it is on the disk.

        Args:
            checkpoint: Tensors and plain values.

        Raises:
            OSError: It cannot be written; what was there is there still.
        """
        content = io.BytesIO()  # as torch hides what goes wrong with a file
        torch.save(dict(checkpoint), content)
        newest = self.files[0]
        fresh = beside(newest, content.getbuffer())
        dropped, self._stale = self._stale, []
        for file in dropped:
            if file != newest:
                file.unlink(missing_ok=True)
        if newest not in dropped:
            self._make_room()
        put(fresh, newest)

    def _make_room(self) -> None:
        """Rename each checkpoint to the next older name, up to the first that is free, or over the oldest."""
        free = next((age for age, file in enumerate(self.files) if not file.exists()), len(self.files) - 1)
        for age in range(free, 0, -1):
            os.replace(self.files[age - 1], self.files[age])
