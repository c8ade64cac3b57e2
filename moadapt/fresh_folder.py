"""Folders written beside their place and renamed there: a reader sees the old one or the new one, never a half.

What is in them is flushed to the disk first, so that a power cut leaves one of the two as well.
"""

import shutil
import tempfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from moadapt.whole_files import flush, put


@contextmanager
def fresh_folder(folder: Path, names: Collection[str]) -> Iterator[Path]:
    """Give a temporary folder that takes `folder`'s place when the block ends well.

    Args:
        folder: Made, or replaced as a whole; a link to a folder stays, and what it names is replaced.
        names: What the caller writes; a folder that holds anything else is not replaced.

    Raises:
        ValueError: It is a file, the working folder, or a folder that holds something else.
    """
    folder = folder.resolve()
    if folder.is_file():
        raise ValueError(f"{folder} is a file; give the path of a folder, made or replaced as a whole")
    if folder.is_dir() and folder.samefile("."):
        raise ValueError(f"{folder} is the working folder, which cannot be replaced; give the path of another folder")
    stray = sorted(entry.name for entry in folder.iterdir() if entry.name not in names) if folder.exists() else []
    if stray:
        raise ValueError(
            f"{folder} holds {stray[0]!r} and would be replaced as a whole; give the path of a new or empty folder, or "
            f"of one that holds only {', '.join(names)}"
        )
    folder.parent.mkdir(parents=True, exist_ok=True)
    new = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    old = new.with_name(new.name + "-old")
    try:
        yield new
        new.chmod(0o755)
        for path in (*new.iterdir(), new):
            flush(path)
        if folder.exists():
            folder.rename(old)
        put(new, folder)
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)
        if old.exists() and not folder.exists():
            old.rename(folder)
        raise
    shutil.rmtree(old, ignore_errors=True)
