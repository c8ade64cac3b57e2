"""Tar shards in WebDataset's form, read sample by sample where they lie.

A sample is a run of files with one name: `000123.jpg`, `000123.json`, `000123.txt`. The fields of its row are those of
its JSON object, and every other file by its ending: `{jpg}` a picture, `{txt}` a text; `000123.left.jpg` is
`{left_jpg}`. Nothing is unpacked, names are only labels, and files of other kinds, such as pickles, are never decoded.
"""

import json
import tarfile
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from glob import glob
from io import BytesIO
from itertools import accumulate
from pathlib import Path
from typing import Any

from moadapt.registry import TASKS
from moadapt.task import BadExample, Example
from moadapt_tasks.late_rows import LateRows
from moadapt_tasks.own_rows import OwnRows
from moadapt_tasks.patterns import check_template, split_word
from moadapt_tasks.pictures import Pictures, StoredPicture
from moadapt_tasks.records import Record
from moadapt_tasks.tar_index import sample_name, sample_starts

_PICTURES = frozenset({"jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "ppm", "pgm"})
_TEXTS = frozenset({"txt", "text", "cls", "id"})
_LARGEST = 2**28
"""Bytes of a sample; larger ones are not read."""


@TASKS.register("webdataset")
@dataclass(frozen=True, kw_only=True)
class WebDataset(OwnRows):
    """Answers what the samples of tar shards ask; they stay in the shards until they are drawn.

    Args:
        rows: Pattern of the shards, with `{split}` and wildcards, such as `vqa/{split}-*.tar`.

    Raises:
        ValueError: A setting is out of range, a pattern is none, or the metric has no such score.
    """

    rows: str

    def __post_init__(self) -> None:
        """Check the settings."""
        super().__post_init__()
        check_template("rows", self.rows, ["split"])

    def read(self, split: str) -> tuple[Sequence[Example], list[BadExample]]:
        """Find where the samples of a split lie; each is read, and told to be unusable, when it is drawn."""
        word = split_word(self.splits, split)
        pattern = self.rows.format(split=word)
        shards = [Path(name) for name in sorted(glob(pattern, recursive=True))]
        if not shards:
            raise ValueError(f"no file is called {pattern}; give the pattern of tar shards as `rows`")
        return _Samples(self, word, shards), []


class _Samples(LateRows):
    """The samples of some shards, one shard after the other."""

    def __init__(self, task: WebDataset, word: str, shards: Sequence[Path]) -> None:
        self.task, self.word, self.shards = task, word, shards
        self.starts = [sample_starts(shard) for shard in shards]
        self.ends = list(accumulate(len(starts) - 1 for starts in self.starts))

        super().__init__(self.ends[-1], task.limit)

    def at(self, row: int) -> Example:
        """Read one sample."""
        shard = bisect_right(self.ends, row)
        within = row - self.ends[shard] + len(self.starts[shard]) - 1
        start, end = self.starts[shard][within : within + 2].tolist()
        return self.task.example(self.word, Pictures(), _sample(self.shards[shard], start, end))


def _sample(shard: Path, start: int, end: int) -> Record:
    """Read one sample.

    Raises:
        Defect: It is too large, or its files cannot be read.
        ValueError: The shard is no longer what it was.
    """
    if end - start > _LARGEST:
        raise Record(shard, f"sample at byte {start}", {}).wrong(
            f"it has more than {_LARGEST} bytes; write smaller ones"
        )
    with shard.open("rb") as file:
        file.seek(start)
        stored = BytesIO(file.read(end - start))
    try:
        with tarfile.open(fileobj=stored, mode="r:") as tar:
            files = [(m.name, stored.getvalue()[m.offset_data : m.offset_data + m.size]) for m in tar if m.isfile()]
    except tarfile.TarError as error:
        raise ValueError(f"{shard} changed while it was read: {error}; start again") from error
    name, _ = sample_name(files[0][0])
    row = Record(shard, f"sample {name!r}", {})
    for member, data in files:
        _add(row, shard / member, sample_name(member)[1], data)
    return row


def _add(row: Record, member: Path, kind: str, data: bytes) -> None:
    """Put what a file says into the row of its sample."""
    ending, key = kind.rpartition(".")[2], kind.replace(".", "_")
    found: dict[str, Any] = {}
    if ending in _PICTURES:
        found = {key: StoredPicture(member, data)}
    elif ending == "json":
        value = _decoded(row, kind, data)
        found = value if isinstance(value, dict) and kind == "json" else {key: value}
    elif ending in _TEXTS:
        found = {key: _text(row, kind, data)}
    if twice := sorted(found.keys() & row.values.keys()):
        raise row.wrong(f"two of its files say what {', '.join(twice)} is; leave one out")
    row.values.update(found)


def _text(row: Record, kind: str, data: bytes) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise row.wrong(f"its {kind} file is no UTF-8 text: {error}") from error


def _decoded(row: Record, kind: str, data: bytes) -> Any:
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise row.wrong(f"its {kind} file is no JSON: {error}") from error
