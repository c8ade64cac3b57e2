"""What is said in videos, in VALUE's form: `{vid_name, sub: [{text, start, end}]}` a line, with seconds."""

import html
from pathlib import Path

from moadapt_tasks.frames import Moment
from moadapt_tasks.json_rows import read_rows
from moadapt_tasks.reading import Table, index
from moadapt_tasks.records import Record


def read_subtitles(file: Path) -> Table:
    """Read the subtitles of videos, by `vid_name`.

    Raises:
        ValueError: The file is missing, or holds no row.
    """
    rows, unreadable = read_rows(file)
    table = index(file, rows, "vid_name")
    return Table(file, table.rows, unreadable + table.bad)


def spoken(subtitles: Table, record: Record, moment: Moment | None) -> str:
    """Return what is said in an entry's video, which may be nothing.

    Args:
        subtitles: Those of all videos.
        record: The entry, with the video's name under `vid_name`.
        moment: Keep only what is said, even partly, between these seconds.

    Raises:
        Defect: The video is unknown, or a line of it is unusable.
    """
    video = subtitles.find("vid_name", record)
    lines = video.records("sub") if video.values.get("sub") != [] else []
    return " ".join(text for line in lines if _overlaps(line, moment) and (text := _clean(line)))


def _overlaps(line: Record, moment: Moment | None) -> bool:
    if moment is None:
        return True
    start, end = line.number("start"), line.number("end")
    return start <= moment[1] and end >= moment[0]


def _clean(line: Record) -> str:
    """Return a line's text, which subtitle files leave empty now and then."""
    return "" if line.values.get("text") == "" else " ".join(html.unescape(line.text("text")).split())
