"""Pictures on disk: found, whole, and of which size, each looked at once."""

from pathlib import Path

from PIL import Image

from moadapt_tasks.records import Record

_END_OF_JPEG = b"\xff\xd9"
_TAIL = 4096


class Pictures:
    """Knows the sizes of the pictures that were asked for."""

    def __init__(self) -> None:
        self._seen: dict[Path, tuple[int, int] | str] = {}

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


def _look_at(path: Path) -> tuple[int, int] | str:
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        return f"its picture {path} {what}; add it or correct the pattern `images`"
    try:
        return _whole_size(path)
    except Exception as error:  # each of Pillow's formats raises what its own parser meets
        return f"its picture {path} is broken ({type(error).__name__}: {error}); replace it"


def _whole_size(path: Path) -> tuple[int, int]:
    with Image.open(path) as picture:
        size = picture.size
        if picture.format == "PNG":
            picture.verify()
        elif picture.format != "JPEG" or not _ends(path):
            picture.load()  # these formats verify nothing, so only decoding tells
    return size


def _ends(path: Path) -> bool:
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - _TAIL))
        return _END_OF_JPEG in file.read()
