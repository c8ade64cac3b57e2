"""Videos as folders of frames: which frames a row shows."""

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

from moadapt_tasks.records import Record

Frame = TypeVar("Frame")
Moment = tuple[float, float]
"""Start and end, in seconds."""

_SUFFIXES = frozenset((".jpg", ".jpeg", ".png", ".webp", ".bmp"))
_NUMBER = re.compile(r"(\d+)")
_SPAN = re.compile(r"\s*(\d+(?:\.\d*)?)\s*-\s*(\d+(?:\.\d*)?)\s*")
_CUT_SHORT = 1.0
"""How far behind the last frame a moment may begin, in seconds: annotators and frame extractors round."""


class FrameFolders:
    """Knows the frames of the folders that were asked for, each listed once."""

    def __init__(self) -> None:
        self._seen: dict[Path, list[Path] | str] = {}

    def frames(self, folder: Path, record: Record) -> list[Path]:
        """Return a folder's pictures in the order of the numbers in their names; other files are left alone.

        Args:
            folder: One video's.
            record: The entry that wants it.

        Raises:
            Defect: It does not exist, or holds no pictures.
        """
        if folder not in self._seen:
            self._seen[folder] = _listed(folder)
        found = self._seen[folder]
        if isinstance(found, str):
            raise record.wrong(
                f"its video {folder} {found}; extract its frames into a folder or correct the pattern `frames`"
            )
        return found


def moment_of(record: Record, key: str = "ts") -> Moment:
    """Return the moment that an entry is about, written `20.16-25.12` or as a list of two numbers.

    Raises:
        Defect: It is written otherwise, or ends before it begins.
    """
    written = record.values.get(key)
    if isinstance(written, str):
        found = _SPAN.fullmatch(written)
        if found is None:
            raise record.wrong(f"its {key} is {written!r:.60}; give seconds such as '20.16-25.12'")
        start, end = float(found[1]), float(found[2])
    else:
        start, end = record.numbers(key, 2)
    if not 0 <= start <= end:
        raise record.wrong(f"its {key} goes from {start:g} to {end:g}; give a start from 0 on and an end after it")
    return start, end


def within(frames: Sequence[Frame], moment: Moment, rate: float, record: Record) -> Sequence[Frame]:
    """Return the frames of a moment, at least one; the first frame is that of second 0.

    Args:
        frames: All of a video, in order.
        moment: Start and end, in seconds.
        rate: Frames per second, above 0.
        record: The entry that wants them.

    Raises:
        Defect: The moment begins after the video's end.
    """
    start, end = moment
    if start > len(frames) / rate + _CUT_SHORT:
        raise record.wrong(
            f"its moment begins at {start:g} s, but its {len(frames)} frames end at {len(frames) / rate:g} s; "
            "correct it or `frames_per_second`"
        )
    found = frames[math.ceil(start * rate) : math.floor(end * rate) + 1]
    return found or [frames[min(len(frames) - 1, round((start + end) / 2 * rate))]]


def evenly(frames: Sequence[Frame], count: int) -> list[Frame]:
    """Return at most so many frames, each from the middle of an equal stretch.

    Example:
        >>> evenly(range(8), 2), evenly(range(3), 8)
        ([2, 6], [0, 1, 2])
    """
    total = len(frames)
    if total <= count:
        return list(frames)
    return [frames[(2 * index + 1) * total // (2 * count)] for index in range(count)]


def _listed(folder: Path) -> list[Path] | str:
    try:
        files = [file for file in folder.iterdir() if file.suffix.lower() in _SUFFIXES]
    except (FileNotFoundError, NotADirectoryError):
        return "is no folder"
    except (OSError, ValueError) as error:  # a name that no file can have is a ValueError
        return f"cannot be listed ({error})"
    return sorted(files, key=_place) or "holds no pictures"


def _place(file: Path) -> list[tuple[int, str]]:
    """Sort `frame2` before `frame10`."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in _NUMBER.split(file.stem)]
