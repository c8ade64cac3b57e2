"""Exact match: how often a text is one of those that are right, each brought to one spelling before.

Three spellings are known. `squad`: lower case, without ASCII punctuation and the articles a, an and the, single spaces
(Rajpurkar et al. 2016, arXiv:1606.05250). `vqa`: that of the official VQA v2 evaluation, with digits for number words.
`as_is`: only outer and repeated spaces do not count.
"""

import re
import string
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torchmetrics import Metric

from moadapt.registry import TEXT_METRICS
from moadapt_tasks.metrics.rows import check_text_rows
from moadapt_tasks.metrics.vqa_answers import normalise_answer, strip_answer

_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLE = re.compile(r"\b(?:a|an|the)\b")


def squad_spelling(text: str) -> str:
    """Return a text in lower case without punctuation, articles and repeated spaces.

    Example:
        >>> squad_spelling("The man's  red-and-blue cap!")
        'mans redandblue cap'
    """
    return as_is(_ARTICLE.sub(" ", text.lower().translate(_PUNCTUATION)))


def vqa_spelling(text: str) -> str:
    """Return a text as the official VQA v2 evaluation spells answers on which people differ."""
    return normalise_answer(strip_answer(text))


def as_is(text: str) -> str:
    """Return a text without outer and repeated spaces."""
    return " ".join(text.split())


SPELLINGS: Mapping[str, Callable[[str], str]] = {"squad": squad_spelling, "vqa": vqa_spelling, "as_is": as_is}


@TEXT_METRICS.register("exact_match")
class ExactMatch(Metric):
    """Share of texts that equal one of their references.

    Args:
        spelling: How both sides are spelled before they are compared: `squad`, `vqa` or `as_is`.
        **kwargs: Options of every torchmetrics metric.

    Raises:
        ValueError: `spelling` is none of the three.

    Example:
        >>> match = ExactMatch()
        >>> match.update(["The red bus.", "two"], [["a bus", "red bus"], ["2"]])
        >>> match.compute().item()
        0.5
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False

    match_rows: Tensor

    def __init__(self, spelling: Literal["squad", "vqa", "as_is"] = "squad", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if spelling not in SPELLINGS:
            raise ValueError(f"spelling is {spelling!r}; give one of {', '.join(SPELLINGS)}")
        self._spell = SPELLINGS[spelling]
        # A MetricCollection merges metrics whose states bear equal names and happen to be equal after the first batch.
        self._hits = f"match_hits_{spelling}"
        self.add_state(self._hits, torch.tensor(0), dist_reduce_fx="sum")
        self.add_state("match_rows", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, preds: list[str], references: list[list[str]]) -> None:
        """Add texts.

        Args:
            preds: B predicted texts.
            references: The texts that are right for each, at least one.

        Raises:
            ValueError: The lengths differ or a row has no references.
        """
        check_text_rows(preds, references, "references")
        setattr(self, self._hits, getattr(self, self._hits) + sum(map(self._matches, preds, references)))
        self.match_rows += len(preds)

    def compute(self) -> Tensor:
        """Return the share, 0 to 1; nan where no texts were given."""
        hits: Tensor = getattr(self, self._hits)
        return hits.double() / self.match_rows

    def _matches(self, pred: str, references: Sequence[str]) -> bool:
        return self._spell(pred) in {self._spell(reference) for reference in references}
