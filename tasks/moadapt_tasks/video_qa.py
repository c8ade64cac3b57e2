"""Multiple-choice questions about videos, in the form that VALUE gives TVQA and How2QA.

One file a split with a question a line, `{qid, vid_name, ts, q, a0, a1, ..., answer_idx}`, with `ts` such as
`20.16-25.12` or `[20.16, 25.12]`; videos are folders of frames. Lei et al. 2018 (arXiv:1809.01696), Li et al. 2021
(arXiv:2106.04632). Test splits are published without answers.
"""

from dataclasses import dataclass
from functools import partial
from itertools import count, takewhile
from pathlib import Path
from typing import ClassVar

from torchmetrics import Metric

from moadapt.registry import TASKS
from moadapt.task import BadExample, Example
from moadapt_tasks.json_rows import read_rows
from moadapt_tasks.metrics import ChoiceAccuracy
from moadapt_tasks.options import LETTERS, check_options, lettered, meant
from moadapt_tasks.patterns import check_numbers, check_template, split_word
from moadapt_tasks.reading import index
from moadapt_tasks.records import Record, collect
from moadapt_tasks.videos import ShowingVideos, Videos


@TASKS.register("video_qa")
@dataclass(frozen=True, kw_only=True)
class VideoQA(ShowingVideos):
    """Chooses among answers to a question about a video, shown as several pictures, by letter.

    Args:
        questions: Pattern of the files, with `{split}`, such as `tvqa/tvqa_{split}.jsonl`.
        frames: Pattern of the folders of frames, with `{vid_name}` and maybe `{split}`, such as
            `tv/frames/{vid_name}`.
        num_frames: The most frames that a row shows, taken evenly.
        frames_per_second: At which frames were taken (3 for TV); rows then show and quote the question's `ts` only.
            None for whole videos.
        subtitles: File of what is said, such as `tv_subtitles.jsonl`, for a prompt with `{subtitles}`.
        splits: The word that stands for each of our splits in the patterns, such as `validation: val`.
        prompt: What to ask, with `{question}`, `{options}` and maybe `{subtitles}`.
        max_new_tokens: Longest answer to generate, in tokens.
        limit: Only the first so many usable rows of a split; later ones are not looked at.

    Raises:
        ValueError: A setting is out of range or a pattern mentions something else.
    """

    questions: str
    prompt: str = "{question}\n{options}\nAnswer with the letter of an option."
    max_new_tokens: int = 8
    limit: int | None = None
    primary: ClassVar[str] = "accuracy"

    def __post_init__(self) -> None:
        """Check the settings."""
        check_numbers(self.max_new_tokens, self.limit)
        check_template("questions", self.questions, ["split"])
        self.check_videos(["question", "options"], ["options"])

    def read(self, split: str) -> tuple[list[Example], list[BadExample]]:
        """Read one split; see `Task.read`."""
        word = split_word(self.splits, split)
        file = Path(self.questions.format(split=word))
        rows, unreadable = read_rows(file)
        questions = index(file, rows, "qid")
        videos = self.videos()
        examples, bad = collect(questions.rows.values(), partial(self._example, word, videos), self.limit)
        return examples, unreadable + questions.bad + videos.bad + bad

    def parse(self, text: str, example: Example) -> str:
        """Return the letter of the option that the text means."""
        return meant(text, example.reference["options"])

    def metrics(self) -> dict[str, Metric]:
        """Return the share of right choices."""
        return {"accuracy": ChoiceAccuracy()}

    def _example(self, word: str, videos: Videos, row: Record) -> Example:
        asked, options = row.text("q"), _options(row)
        right = row.identifier("answer_idx")
        if not isinstance(right, int) or not 0 <= right < len(options):
            raise row.wrong(f"its answer_idx is {right!r}; give 0 to {len(options) - 1}, as it has so many answers")
        return Example(
            pictures=videos.show(word, row),
            prompt=self.prompt.format(question=asked, options=lettered(options), **videos.quote(row)),
            answers=(LETTERS[right],),
            reference={"right": LETTERS[right], "options": options},
            entry=f"{row.file}: {row.entry}",
        )


def _options(row: Record) -> list[str]:
    keys = list(takewhile(lambda key: key in row.values, (f"a{number}" for number in count())))
    options = [row.text(key) for key in keys]
    check_options(options, row)
    return options
