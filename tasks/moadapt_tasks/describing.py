"""What tasks share that ask for captions: settings and the metrics of the public caption evaluation."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torchmetrics import Metric

from moadapt.task import Example, Task
from moadapt_tasks.metrics.caption_metrics import caption_metrics
from moadapt_tasks.patterns import check_numbers


@dataclass(frozen=True, kw_only=True)
class Describing(Task):
    """Asks for captions.

    Args:
        captions: The files of captions.
        prompt: What to ask.
        max_new_tokens: Longest caption to generate, in tokens.
        more_metrics: Metrics beside CIDEr-D, BLEU and ROUGE-L, by the names of `moadapt list metrics`; `meteor` and
            `spice` need Java.
        limit: Only the first so many usable rows of a split; later ones are not looked at.

    Raises:
        ValueError: A number is out of range, or a metric is unknown or lacks what it needs.
    """

    captions: str
    prompt: str = "describe the picture"
    max_new_tokens: int = 64
    more_metrics: Sequence[str] = ()
    limit: int | None = None
    primary: ClassVar[str] = "cider_d"

    def __post_init__(self) -> None:
        """Check the settings."""
        check_numbers(self.max_new_tokens, self.limit)
        caption_metrics(self.more_metrics)

    def parse(self, text: str, example: Example) -> str:
        """Return the text without outer space."""
        return text.strip()

    def metrics(self) -> dict[str, Metric]:
        """Return CIDEr-D, BLEU-1 to BLEU-4 and ROUGE-L, and those that were asked for beside."""
        return caption_metrics(self.more_metrics)
