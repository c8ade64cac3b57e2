"""What rows about videos show and quote: frames from folders, subtitles from a file; and the settings of both."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from moadapt.picture import Picture
from moadapt.task import BadExample, Task
from moadapt_tasks.frames import FrameFolders, evenly, moment_of, within
from moadapt_tasks.patterns import check_splits, check_template, own_words, picture_path, template_fields
from moadapt_tasks.pictures import Pictures
from moadapt_tasks.records import Record
from moadapt_tasks.subtitles import read_subtitles, spoken


class Videos:
    """Finds the frames and the subtitles of rows.

    Args:
        frames: Pattern of the folders of frames, with `{vid_name}` and maybe `{split}`.
        num_frames: The most frames that a row shows, from 1.
        frames_per_second: At which frames were taken; rows then show and quote their moment only.
        subtitles: The file of what is said, if rows quote it.

    Raises:
        ValueError: The subtitles file is missing, or holds no row.
    """

    def __init__(self, frames: str, num_frames: int, frames_per_second: float | None, subtitles: str | None) -> None:
        self.frames, self.num_frames, self.frames_per_second = frames, num_frames, frames_per_second
        self._said = None if subtitles is None else read_subtitles(Path(subtitles))
        self._folders, self._pictures = FrameFolders(), Pictures()

    @property
    def bad(self) -> list[BadExample]:
        """What cannot be used of the subtitles."""
        return [] if self._said is None else self._said.bad

    def show(self, word: str, row: Record) -> tuple[Picture, ...]:
        """Return frames of a row's video, evenly spread over all of it or over its moment.

        Raises:
            Defect: The row lacks what is needed, or the video has no such frames.
        """
        folder = picture_path(self.frames, row, split=word, vid_name=row.identifier("vid_name"))
        frames: Sequence[Path] = self._folders.frames(folder, row)
        if self.frames_per_second is not None:
            frames = within(frames, moment_of(row), self.frames_per_second, row)
        shown = evenly(frames, self.num_frames)
        return tuple(Picture(file, self._pictures.size(file, row)) for file in shown)

    def quote(self, row: Record) -> dict[str, str]:
        """Return what a prompt's `{subtitles}` is filled with, if rows quote any.

        Raises:
            Defect: The video is unknown to the subtitles, or they are unusable.
        """
        if self._said is None:
            return {}
        return {"subtitles": spoken(self._said, row, None if self.frames_per_second is None else moment_of(row))}


@dataclass(frozen=True, kw_only=True)
class ShowingVideos(Task):
    """What tasks about videos share.

    Args:
        frames: Pattern of the folders of frames, with `{vid_name}` and maybe `{split}`.
        num_frames: The most frames that a row shows, taken evenly.
        frames_per_second: At which frames were taken; rows then show and quote their `ts` only. None for whole videos.
        subtitles: File of what is said, for a prompt with `{subtitles}`.
        splits: The word that stands for each of our splits in the patterns.
        prompt: What to ask, maybe with `{subtitles}`.

    Raises:
        ValueError: A setting is out of range or a pattern mentions something else.
    """

    frames: str
    num_frames: int = 8
    frames_per_second: float | None = None
    subtitles: str | None = None
    splits: Mapping[str, str] = field(default_factory=own_words)
    prompt: str

    def check_videos(self, accepted: Collection[str] = (), needed: Collection[str] = ()) -> None:
        """Check the settings, and a prompt, which mentions `{subtitles}` just where there is a file of them.

        Args:
            accepted: What else the prompt may mention.
            needed: Of which it must mention one, if there are any.

        Raises:
            ValueError: A number is out of range, or a pattern mentions something else.
        """
        check_splits(self.splits)
        check_template("frames", self.frames, ["split", "vid_name"], ["vid_name"])
        if self.num_frames < 1:
            raise ValueError(f"`num_frames` is {self.num_frames}; give at least 1")
        if self.frames_per_second is not None and not self.frames_per_second > 0:
            given = self.frames_per_second
            raise ValueError(f"`frames_per_second` is {given}; give a number above 0, or null for whole videos")
        check_template("prompt", self.prompt, [*accepted, "subtitles"], needed)
        if ("subtitles" in template_fields(self.prompt)) != (self.subtitles is not None):
            raise ValueError(f"`prompt` is {self.prompt!r} and `subtitles` is {self.subtitles!r}; give both or neither")

    def videos(self) -> Videos:
        """Return what finds the videos of rows."""
        return Videos(self.frames, self.num_frames, self.frames_per_second, self.subtitles)
