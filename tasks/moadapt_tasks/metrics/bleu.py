"""BLEU: how many of a caption's n-grams its references share, over a whole corpus.

`BLEU_n = brevity * (p_1 ... p_n)^(1/n)`, where `p_k` is the share of predicted k-grams found in a reference (each
k-gram at most as often as in the reference that has it most) and `brevity = min(1, exp(1 - r/c))` for `c` predicted
words and `r` words of the references closest in length. Papineni et al. 2002; here as in the public COCO caption
evaluation, whose small constants keep a corpus without a match from dividing by zero.
"""

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torchmetrics import Metric

from moadapt.registry import TEXT_METRICS
from moadapt_tasks.metrics.caption_tokens import caption_tokens
from moadapt_tasks.metrics.ngrams import Ngram, ngram_counts
from moadapt_tasks.metrics.rows import check_text_rows

TINY = 1e-15  # added to counts of matches
SMALL = 1e-9  # added to counts of n-grams


class BleuCounts(NamedTuple):
    """What BLEU adds up: matched and predicted n-grams for each length n, and words of prediction and reference."""

    matched: list[int]
    predicted: list[int]
    words: int
    reference_words: int


def bleu_counts(pred: Sequence[str], references: Sequence[Sequence[str]], n_gram: int) -> BleuCounts:
    """Count one caption against its references.

    Args:
        pred: Words of the predicted caption.
        references: Words of each reference, at least one. The closest in length counts for brevity, of two equally
            close ones the shorter.
        n_gram: Length of the longest n-gram.
    """
    found: Counter[Ngram] = Counter()
    for reference in references:
        found |= ngram_counts(reference, n_gram)
    shared = ngram_counts(pred, n_gram) & found
    matched = [0] * n_gram
    for ngram, count in shared.items():
        matched[len(ngram) - 1] += count
    predicted = [max(0, len(pred) - length) for length in range(n_gram)]
    closest = min((abs(len(reference) - len(pred)), len(reference)) for reference in references)[1]
    return BleuCounts(matched, predicted, len(pred), closest)


def bleu_scores(counts: BleuCounts) -> list[float]:
    """Return BLEU-1 to BLEU-n, each 0 to 1, from the counts of a corpus."""
    ratio = (counts.words + TINY) / (counts.reference_words + SMALL)
    brevity = math.exp(1 - 1 / ratio) if ratio < 1 else 1.0
    scores, product = [], 1.0
    for length, (matched, predicted) in enumerate(zip(counts.matched, counts.predicted, strict=True), start=1):
        product *= (matched + TINY) / (predicted + SMALL)
        scores.append(brevity * product ** (1 / length))
    return scores


@TEXT_METRICS.register("bleu")
class BLEU(Metric):
    """Corpus BLEU of captions, with the values of the public COCO caption evaluation.

    Args:
        n_gram: Length of the longest n-gram, 1 or more.
        **kwargs: Options of every torchmetrics metric.

    Raises:
        ValueError: `n_gram` is below 1.

    Example:
        >>> bleu = BLEU(n_gram=1)
        >>> bleu.update(["a red cat"], [["A red dog.", "The red animal runs."]])
        >>> round(bleu.compute()["bleu_1"].item(), 4)  # "a" and "red" of three words
        0.6667
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False

    bleu_matched: Tensor
    bleu_predicted: Tensor
    bleu_words: Tensor
    bleu_reference_words: Tensor
    bleu_rows: Tensor

    def __init__(self, n_gram: int = 4, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if n_gram < 1:
            raise ValueError(f"n_gram is {n_gram}; give the length of the longest n-gram, 1 or more (4 is usual)")
        self.n_gram = n_gram
        self.add_state("bleu_matched", torch.zeros(n_gram, dtype=torch.long), dist_reduce_fx="sum")
        self.add_state("bleu_predicted", torch.zeros(n_gram, dtype=torch.long), dist_reduce_fx="sum")
        self.add_state("bleu_words", torch.tensor(0), dist_reduce_fx="sum")
        self.add_state("bleu_reference_words", torch.tensor(0), dist_reduce_fx="sum")
        self.add_state("bleu_rows", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, preds: list[str], references: list[list[str]]) -> None:
        """Add captions.

        Args:
            preds: B predicted captions.
            references: The references of each, at least one.

        Raises:
            ValueError: The lengths differ or a row has no references.
        """
        check_text_rows(preds, references, "references")
        counts = [
            bleu_counts(caption_tokens(pred), [caption_tokens(text) for text in texts], self.n_gram)
            for pred, texts in zip(preds, references, strict=True)
        ]
        self.bleu_matched += self._total([row.matched for row in counts])
        self.bleu_predicted += self._total([row.predicted for row in counts])
        self.bleu_words += sum(row.words for row in counts)
        self.bleu_reference_words += sum(row.reference_words for row in counts)
        self.bleu_rows += len(counts)

    def compute(self) -> dict[str, Tensor]:
        """Return `bleu_1` to `bleu_n`, each 0 to 1; nan where no captions were given."""
        counts = BleuCounts(
            self.bleu_matched.tolist(),
            self.bleu_predicted.tolist(),
            int(self.bleu_words),
            int(self.bleu_reference_words),
        )
        scores = bleu_scores(counts) if self.bleu_rows > 0 else [math.nan] * self.n_gram
        return {
            f"bleu_{length}": torch.tensor(score, dtype=torch.float64, device=self.device)
            for length, score in enumerate(scores, start=1)
        }

    def _total(self, rows: list[list[int]]) -> Tensor:
        """Add up rows of one count a length n; there may be none."""
        return torch.tensor(rows, dtype=torch.long, device=self.device).reshape(-1, self.n_gram).sum(dim=0)
