"""Pictures on disk: found, whole, and of which size, each looked at once."""

import os
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import BinaryIO

from PIL import Image

from moadapt.picture import Picture
from moadapt_tasks.patterns import picture_path
from moadapt_tasks.records import Identifier, Record

_LAST_BYTES = {"JPEG": b"\xff\xd9", "MPO": b"\xff\xd9", "PNG": b"IEND\xaeB`\x82"}
"""Formats whose files say where they end, so that a few bytes tell a whole one from a truncated one."""
_TAIL = 4096
"""How far before the end of the file they may stand: cameras and web servers append to pictures."""


class Pictures:
    """Knows the sizes of the pictures that were asked for."""

    def __init__(self) -> None:
        self._seen: dict[Path, tuple[int, int] | str] = {}

    def find(self, pattern: str, record: Record, **values: Identifier) -> Picture:
        """Return the picture that a path pattern leads to.

        Args:
            pattern: The setting `images`.
            record: The entry that wants it.
            **values: What fills the pattern.

        Raises:
            Defect: A value does not suit the pattern, or the picture is missing, truncated or none.
        """
        path = picture_path(pattern, record, **values)
        return Picture(path, self.size(path, record))

    def size(self, path: Path, record: Record) -> tuple[int, int]:
        """Return the width and height of a picture as stored; no EXIF rotation is applied.

        Args:
            path: The picture.
            record: The entry that wants it.

        Raises:
            Defect: It is missing, truncated or no picture; reported as the entry's.
        """
        if path not in self._seen:
            self._seen[path] = _look_at(path)
        found = self._seen[path]
        if isinstance(found, str):
            raise record.wrong(found)
        return found


@dataclass(frozen=True)
class StoredPicture:
    """A picture that a row itself holds.

    Args:
        name: What to call it in messages.
        data: What its file would hold.
    """

    name: Path
    data: bytes = field(repr=False)

    def picture(self, record: Record) -> Picture:
        """Return it with its size.

        Args:
            record: The row that holds it.

        Raises:
            Defect: It is truncated or no picture; reported as the row's.
        """
        try:
            return Picture(self.name, _whole_size(BytesIO(self.data)), self.data)
        except Exception as error:  # each of Pillow's formats raises what its own parser meets
            raise record.wrong(_broken(self.name, error)) from error


def _look_at(path: Path) -> tuple[int, int] | str:
    try:
        with path.open("rb") as file:
            return _whole_size(file)
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        what = "is a folder" if path.is_dir() else "does not exist"
        return f"its picture {path} {what}; add it or correct the pattern `images`"
    except Exception as error:  # each of Pillow's formats raises what its own parser meets
        return _broken(path, error)


def _broken(path: Path, error: Exception) -> str:
    return f"its picture {path} is broken ({type(error).__name__}: {error}); replace it"


def _whole_size(file: BinaryIO) -> tuple[int, int]:
    with Image.open(file) as picture:
        size, last = picture.size, _LAST_BYTES.get(picture.format or "")
        if last is None:
            picture.load()  # only decoding tells
        elif not _ends(file, last):
            raise ValueError("its end is missing")
    return size


def _ends(file: BinaryIO, last: bytes) -> bool:
    length = file.seek(0, os.SEEK_END)
    file.seek(max(0, length - _TAIL))
    return last in file.read()
