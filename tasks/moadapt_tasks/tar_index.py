"""Where the samples of a tar shard begin: eight bytes a sample, found once and kept beside the shard.

A sample is a run of files that share their name up to the first dot of its last part, as WebDataset writes them.
"""

import os
import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

BLOCK = tarfile.BLOCKSIZE
Starts = NDArray[np.int64]


def sample_name(member: str) -> tuple[str, str]:
    """Return the name of the sample that a member belongs to, and what tells the member from its others."""
    folder, slash, file = member.rpartition("/")
    name, _, kind = file.partition(".")
    return f"{folder}{slash}{name}", kind.lower()


def sample_starts(shard: Path) -> Starts:
    """Return the first byte of every sample, and of what follows the last one.

    The index is written to `<shard>.index`, where the folder can be written to, and used until the shard changes.

    Args:
        shard: An uncompressed tar file.

    Raises:
        ValueError: It is missing, broken, compressed or something else.
    """
    kept = shard.with_name(f"{shard.name}.index")
    try:
        stat = shard.stat()
        state = {"size": str(stat.st_size), "modified": str(stat.st_mtime_ns)}
        starts = _kept(kept, state)
        return _indexed(shard, kept, state) if starts is None else starts
    except (OSError, tarfile.TarError) as error:
        raise ValueError(f"{shard} cannot be read: {error}; give whole, uncompressed tar files") from error


def _indexed(shard: Path, kept: Path, state: dict[str, str]) -> Starts:
    starts = np.fromiter(_starts(shard), dtype=np.int64)
    fresh = kept.with_name(f".{kept.name}-{os.getpid()}")
    try:
        save_file({"starts": starts}, fresh, state)
        os.replace(fresh, kept)
    except (OSError, SafetensorError):  # the folder cannot be written to: the index is found anew each time
        fresh.unlink(missing_ok=True)
    return starts


def _starts(shard: Path) -> Iterator[int]:
    last, end = None, 0
    with tarfile.open(shard, "r:") as tar:
        while (member := tar.next()) is not None:
            tar.members = []  # type: ignore[attr-defined]  # or it would keep them all
            if member.isfile():
                name, _ = sample_name(member.name)
                if name != last:
                    yield member.offset
                last, end = name, tar.offset
    yield end


def _kept(file: Path, state: dict[str, str]) -> Starts | None:
    """Return an index that was kept, where it is of the shard as it is."""
    if not file.is_file():
        return None
    try:
        with safe_open(file, "numpy") as stored:
            if stored.metadata() != state:
                return None
            starts: Starts = stored.get_tensor("starts")
    except SafetensorError as error:
        raise ValueError(f"{file} is broken: {error}; delete it") from error
    fits = starts.dtype == np.int64 and starts.ndim == 1 and len(starts) > 0 and starts[-1] <= int(state["size"])
    if not fits or (starts < 0).any() or (np.diff(starts) <= 0).any() or (starts % BLOCK).any():
        raise ValueError(f"{file} is no index of its shard; delete it")
    return starts
