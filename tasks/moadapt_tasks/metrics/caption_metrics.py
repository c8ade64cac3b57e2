"""The metrics of captioning tasks: those of the public COCO caption evaluation."""

from collections.abc import Sequence

from torchmetrics import Metric

from moadapt.registry import TEXT_METRICS
from moadapt_tasks.metrics.bleu import BLEU
from moadapt_tasks.metrics.cider_d import CIDErD
from moadapt_tasks.metrics.rouge_l import ROUGEL


def caption_metrics(more: Sequence[str]) -> dict[str, Metric]:
    """Return CIDEr-D, BLEU-1 to BLEU-4 and ROUGE-L, and others that are asked for.

    Args:
        more: Their names in `moadapt list metrics`, such as `meteor`.

    Raises:
        ValueError: `more` is a single text, a name is unknown, or what one needs is missing.
    """
    if isinstance(more, str):
        raise ValueError(f"`more_metrics` is {more!r}; give a list of names, such as [meteor]")
    return {"cider_d": CIDErD(), "bleu": BLEU(), "rouge_l": ROUGEL()} | {
        name: TEXT_METRICS.get(name)() for name in more
    }
