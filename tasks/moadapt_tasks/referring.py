"""What tasks share that ask for the box of what an expression refers to: settings, one box an answer, accuracy@0.5."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

from torchmetrics import Metric

from moadapt.task import Example, Task
from moadapt_tasks.boxes import Box, BoxCodec, IntegerBoxes
from moadapt_tasks.metrics import GroundingAccuracy
from moadapt_tasks.patterns import check_numbers, check_splits, check_template, own_words


@dataclass(frozen=True, kw_only=True)
class Referring(Task):
    """Asks for the box of what an expression refers to.

    Args:
        refs: Pattern of the files of expressions; `{split}` may stand in it.
        images: Pattern of the pictures, with a field that names one and maybe `{split}`.
        splits: The word that stands for each of our splits.
        codec: How boxes are written; boxes are cut to what its view shows, while predictions are compared with all of
            the true box.
        prompt: What to ask, with `{expression}`.
        max_new_tokens: Longest answer to generate, in tokens.
        limit: Only the first so many usable rows of a split; later ones are not looked at.

    Raises:
        ValueError: A setting is out of range or a pattern mentions something else.
    """

    refs: str
    images: str
    splits: Mapping[str, str] = field(default_factory=own_words)
    codec: BoxCodec = field(default_factory=IntegerBoxes)
    prompt: str = "where is {expression}?"
    max_new_tokens: int = 32
    limit: int | None = None
    primary: ClassVar[str] = "accuracy"
    names_picture: ClassVar[tuple[str, ...]]
    """The fields of which `images` must mention one."""

    def __post_init__(self) -> None:
        """Check the settings."""
        check_splits(self.splits)
        check_numbers(self.max_new_tokens, self.limit)
        check_template("refs", self.refs, ["split"])
        check_template("images", self.images, ["split", *self.names_picture], self.names_picture)
        check_template("prompt", self.prompt, ["expression"], ["expression"])

    def parse(self, text: str, example: Example) -> Box | list[Box] | None:
        """Return the first box of the text in pixels, or None."""
        return next(iter(self.codec.read(text, example.pictures[0].size) or ()), None)

    def metrics(self) -> dict[str, Metric]:
        """Return the share of boxes with an IoU of at least 0.5, and the mean IoU."""
        return {"box": GroundingAccuracy()}
