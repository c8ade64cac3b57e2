"""Files that are there whole or not at all, also after a full disk or a power cut.

They are written beside their place, flushed to the disk, and renamed there. A rename is on the disk once its folder is.
"""

import os
from pathlib import Path


def write_whole(file: Path, content: bytes | memoryview) -> None:
    """Write a file whole, or leave what is there.

    Args:
        file: Made, its folder too, or replaced.
        content: What it is to hold.

    Raises:
        OSError: It cannot be written; nothing of it is left.
    """
    put(beside(file, content), file)


def beside(file: Path, content: bytes | memoryview) -> Path:
    """Write what is to become a file under a hidden name in its folder, and flush it.

    Args:
        file: Where it is to be; its folder is made.
        content: What it is to hold.

    Returns:
        The hidden file, for `put`.

    Raises:
        OSError: It cannot be written; nothing of it is left.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    fresh = file.with_name(f".{file.name}")
    try:
        with fresh.open("wb") as opened:
            opened.write(content)
            opened.flush()
            os.fsync(opened.fileno())
    except BaseException:
        fresh.unlink(missing_ok=True)
        raise
    return fresh


def put(fresh: Path, file: Path) -> None:
    """Give a file or folder its name, for good.

    Args:
        fresh: What was written and flushed.
        file: In the same folder; a file there is replaced.
    """
    os.replace(fresh, file)
    flush(file.parent)


def flush(path: Path) -> None:
    """Have what was written reach the disk.

    Args:
        path: A file, or a folder, whose names are meant and not what is in its files.
    """
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)
