"""CIDEr-D: how near a caption is to its references in n-grams weighted by how telling they are.

An n-gram `w` that occurs `f(w)` times in a caption weighs `f(w) (log N - log max(1, d(w)))`, where `d(w)` of the
corpus's `N` images have it in a reference. For each n the similarity to a reference is the cosine of the two weight
vectors, the prediction's weights clipped to the reference's, times `exp(-(l - l')^2 / (2 * 6^2))` for lengths `l` and
`l'`. The score is ten times the mean over n = 1..4 and over references; the corpus's is the mean over images. Vedantam
et al. 2015 (arXiv:1411.5726); here as in the public COCO caption evaluation, with document frequencies from the
references given.
"""

import math
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from moadapt.registry import TEXT_METRICS
from moadapt_tasks.metrics.caption_tokens import caption_tokens
from moadapt_tasks.metrics.kept_rows import KeptRows
from moadapt_tasks.metrics.ngrams import Ngram, ngram_counts
from moadapt_tasks.metrics.rows import check_text_rows

LONGEST = 4
SIGMA = 6.0


class WeighedCaption(NamedTuple):
    """A caption's n-gram weights and their norms, one entry for each n, and its length in words."""

    weights: list[dict[Ngram, float]]
    norms: list[float]
    length: int


def document_frequencies(references: Sequence[Sequence[Sequence[str]]]) -> Counter[Ngram]:
    """Count for each n-gram the images that have it in at least one of their references."""
    return Counter(
        ngram for texts in references for ngram in set().union(*(ngram_counts(text, LONGEST) for text in texts))
    )


def weigh(tokens: Sequence[str], frequencies: Counter[Ngram], images: int) -> WeighedCaption:
    """Weigh a caption's n-grams by how few images have them."""
    weights: list[dict[Ngram, float]] = [{} for _ in range(LONGEST)]
    for ngram, count in ngram_counts(tokens, LONGEST).items():
        weights[len(ngram) - 1][ngram] = count * (math.log(images) - math.log(max(1, frequencies[ngram])))
    norms = [math.sqrt(math.fsum(weight**2 for weight in of_length.values())) for of_length in weights]
    return WeighedCaption(weights, norms, len(tokens))


def similarity(pred: WeighedCaption, reference: WeighedCaption) -> float:
    """Return the length-penalised mean cosine over n of a prediction and one reference, 0 to 1."""
    cosines = []
    for of_pred, of_reference, *norms in zip(pred.weights, reference.weights, pred.norms, reference.norms, strict=True):
        product = math.fsum(
            min(weight, of_reference[ngram]) * of_reference[ngram]
            for ngram, weight in of_pred.items()
            if ngram in of_reference
        )
        cosines.append(product / (norms[0] * norms[1]) if product > 0 else 0.0)
    penalty = math.exp(-((pred.length - reference.length) ** 2) / (2 * SIGMA**2))
    return penalty * sum(cosines) / LONGEST


def cider_d(preds: Sequence[Sequence[str]], references: Sequence[Sequence[Sequence[str]]]) -> list[float]:
    """Score the captions of a corpus, each 0 to 10.

    Args:
        preds: Words of B predicted captions, one an image.
        references: Words of each image's references, at least one.
    """
    frequencies = document_frequencies(references)
    scores = []
    for pred, texts in zip(preds, references, strict=True):
        weighed = weigh(pred, frequencies, len(preds))
        near = [similarity(weighed, weigh(text, frequencies, len(preds))) for text in texts]
        scores.append(10 * sum(near) / len(near))
    return scores


@TEXT_METRICS.register("cider_d")
class CIDErD(KeptRows):
    """Mean CIDEr-D of captions, with the values of the public COCO caption evaluation ("CIDEr" there).

    All captions are kept until the end, since the document frequencies are those of the whole corpus, over all
    processes. The value that `forward` gives for a batch takes the batch for the corpus.

    Args:
        **kwargs: Options of every torchmetrics metric.

    Example:
        >>> cider = CIDErD()
        >>> cider.update(["a red cat sleeps", "two dogs run"], [["A red cat sleeps."], ["A bus waits."]])
        >>> round(cider.compute().item(), 4)  # the first is perfect, the second shares nothing
        5.0
    """

    def update(self, preds: list[str], references: list[list[str]]) -> None:
        """Add captions.

        Args:
            preds: B predicted captions, one an image.
            references: The references of each, at least one.

        Raises:
            ValueError: The lengths differ or a row has no references.
        """
        check_text_rows(preds, references, "references")
        self.keep(
            [[caption_tokens(text) for text in (pred, *texts)] for pred, texts in zip(preds, references, strict=True)]
        )

    def compute(self) -> Tensor:
        """Return the mean over captions, 0 to 10; nan where none were given."""
        rows = self.kept()
        scores = cider_d([pred for pred, *_ in rows], [texts for _, *texts in rows])
        return self.number(math.fsum(scores) / len(scores) if scores else math.nan)
