"""Captioning of moments of videos, in the form that VALUE gives TVC, YC2C and VATEX-EN-C.

One file a split with a clip a line, `{clip_id, vid_name, ts: [start, end], descs: [{desc_id, desc}]}`; videos are
folders of frames. Li et al. 2021 (arXiv:2106.04632). Test splits are published without descriptions.
"""

from dataclasses import dataclass
from functools import partial
from pathlib import Path

from moadapt.registry import TASKS
from moadapt.task import BadExample, Example
from moadapt_tasks.describing import Describing
from moadapt_tasks.json_rows import read_rows
from moadapt_tasks.patterns import check_template, split_word
from moadapt_tasks.reading import index
from moadapt_tasks.records import Record, collect
from moadapt_tasks.videos import ShowingVideos, Videos


@TASKS.register("video_captioning")
@dataclass(frozen=True, kw_only=True)
class VideoCaptioning(Describing, ShowingVideos):
    """Describes videos, shown as several pictures; one row a clip, with all its captions.

    Args:
        captions: Pattern of the files, with `{split}`, such as `tvc/tvc_{split}_release.jsonl`.
        frames: Pattern of the folders of frames, with `{vid_name}` and maybe `{split}`, such as
            `tv/frames/{vid_name}`.
        num_frames: The most frames that a row shows, taken evenly.
        frames_per_second: At which frames were taken (3 for TV); rows then show and quote the clip's `ts` only. None
            for whole videos.
        subtitles: File of what is said, such as `tv_subtitles.jsonl`, for a prompt with `{subtitles}`.
        splits: The word that stands for each of our splits in the patterns, such as `validation: val`.
        prompt: What to ask, maybe with `{subtitles}`.
        max_new_tokens: Longest caption to generate, in tokens.
        more_metrics: Metrics beside CIDEr-D, BLEU and ROUGE-L, by the names of `moadapt list metrics`; `meteor` and
            `spice` need Java.
        limit: Only the first so many usable rows of a split; later ones are not looked at.

    Raises:
        ValueError: A setting is out of range or a pattern mentions something else.
    """

    prompt: str = "describe the video"

    def __post_init__(self) -> None:
        """Check the settings."""
        super().__post_init__()
        self.check_videos()
        check_template("captions", self.captions, ["split"])

    def read(self, split: str) -> tuple[list[Example], list[BadExample]]:
        """Read one split; see `Task.read`."""
        word = split_word(self.splits, split)
        file = Path(self.captions.format(split=word))
        rows, unreadable = read_rows(file)
        clips = index(file, rows, "clip_id")
        videos = self.videos()
        unusable: list[BadExample] = []
        make = partial(self._example, word, videos, unusable)
        examples, bad = collect(clips.rows.values(), make, self.limit)
        return examples, unreadable + clips.bad + videos.bad + unusable + bad

    def _example(self, word: str, videos: Videos, unusable: list[BadExample], clip: Record) -> Example:
        captions, bad = collect(clip.records("descs", "desc_id"), lambda each: each.text("desc"))
        unusable += bad
        if not captions:
            raise clip.wrong("none of its descs is usable; add one or leave the clip out")
        return Example(
            pictures=videos.show(word, clip),
            prompt=self.prompt.format(**videos.quote(clip)),
            answers=tuple(captions),
            reference=captions,
            entry=f"{clip.file}: {clip.entry}",
        )
