"""Tables of the `datasets` library: data sets of a hub, or parquet files of one's own.

The library writes each split once into its cache as an Arrow file, from which rows are read where they lie; nothing is
held in memory. A field of a field is `{outer_inner}`, of a list of objects the list of theirs; class labels are their
names; pictures stand in their own field. No code of a data set is run.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from glob import glob
from pathlib import Path
from typing import Any

from moadapt.registry import TASKS
from moadapt.task import BadExample, Example
from moadapt_tasks.late_rows import LateRows
from moadapt_tasks.own_rows import OwnRows
from moadapt_tasks.patterns import check_template, split_word
from moadapt_tasks.pictures import Pictures, StoredPicture
from moadapt_tasks.records import Record

_PARQUET = ".parquet"


@TASKS.register("datasets")
@dataclass(frozen=True, kw_only=True)
class HubRows(OwnRows):
    """Answers what the rows of a table ask: a data set of a hub, or parquet files; needs datasets.

    Args:
        rows: Name of the data set, such as `lmms-lab/VQAv2`, or a pattern of parquet files, with `{split}` and
            wildcards, such as `vqa/{split}-*.parquet`.
        config: Which of the data set's configurations; None for its only or default one.
        revision: Commit or tag of the data set; None for its newest state.

    Raises:
        ValueError: A setting is out of range, a pattern is none, or the metric has no such score.
    """

    rows: str
    config: str | None = None
    revision: str | None = None

    def __post_init__(self) -> None:
        """Check the settings."""
        super().__post_init__()
        check_template("rows", self.rows, ["split"])
        if self.rows.endswith(_PARQUET) and (self.config or self.revision):
            raise ValueError(
                f"`rows` {self.rows!r} are files; leave out `config` and `revision`, which a hub's data have"
            )

    def read(self, split: str) -> tuple[Sequence[Example], list[BadExample]]:
        """Open the table of a split; its rows are read, and told to be unusable, when they are drawn."""
        word = split_word(self.splits, split)
        return _Rows(self, word, self._table(word)), []

    def _table(self, word: str) -> Any:
        try:
            import datasets
        except ImportError as error:
            raise ValueError("the task datasets reads with that library; run `pip install moadapt[hub]`") from error
        name = self.rows.format(split=word)
        try:
            if not name.endswith(_PARQUET):
                return datasets.load_dataset(name, self.config, split=word, revision=self.revision)
            if not (files := sorted(glob(name, recursive=True))):
                raise ValueError("no such file")
            return datasets.load_dataset("parquet", data_files=files, split="train")
        except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
            raise ValueError(
                f"{name}, split {word!r}, cannot be read: {error}; give the name of a data set, or a pattern of "
                "parquet files, and the words for its splits"
            ) from error


class _Rows(LateRows):
    """The rows of a table."""

    def __init__(self, task: HubRows, word: str, table: Any) -> None:
        self.task, self.word, self.table = task, word, table.with_format("arrow")
        self.labels = {name: names for name, f in table.features.items() if (names := _label_names(f)) is not None}

        super().__init__(len(table), task.limit)

    def at(self, row: int) -> Example:
        """Read one row."""
        [values] = self.table[row].to_pylist()
        place = Path(self.task.rows.format(split=self.word))
        found: dict[str, Any] = {}
        for name, value in values.items():
            found |= _fields(name, _named(value, self.labels.get(name)), place / f"row {row}")
        return self.task.example(self.word, Pictures(), Record(place, f"row {row}", found))


def _label_names(feature: Any) -> list[str] | None:
    """Return the names of a field's class labels, or of those in its list."""
    names: list[str] | None = getattr(getattr(feature, "feature", feature), "names", None)
    return names


def _named(value: Any, names: list[str] | None) -> Any:
    """Replace class labels by their names; some rows of a test split have none, or -1."""
    if names is None or value is None:
        return value
    if isinstance(value, list):
        return [_named(each, names) for each in value]
    return names[value] if value >= 0 else None


def _fields(name: str, value: Any, place: Path) -> dict[str, Any]:
    """Return a field of a table as fields of a row: pictures as such, objects taken apart."""
    if isinstance(value, bytes):
        return {name: StoredPicture(place / name, value)}
    if isinstance(value, dict):
        if value.keys() == {"bytes", "path"}:
            return _fields(name, value["bytes"], place) if value["bytes"] or not value["path"] else {name: value}
        return {key: each for inner, v in value.items() for key, each in _fields(f"{name}_{inner}", v, place).items()}
    if isinstance(value, list):
        found: dict[str, list[Any]] = {}
        for position, item in enumerate(value):
            for key, each in _fields(name, item, place / str(position)).items():
                found.setdefault(key, []).append(each)
        return found or {name: []}
    return {name: value}
