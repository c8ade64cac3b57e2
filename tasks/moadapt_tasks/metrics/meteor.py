"""METEOR: how well a caption's words align with a reference's, equal, of one stem, synonyms or paraphrases.

Denkowski and Lavie 2014, version 1.5, as the public COCO caption evaluation runs it. It is a Java program, which the
optional package `pycocoevalcap` brings along: `pip install moadapt[java]`.
"""

import math
from typing import Any

from torch import Tensor

from moadapt.registry import TEXT_METRICS
from moadapt_tasks.metrics.java_captions import corpus_score, require_java, tokenised
from moadapt_tasks.metrics.kept_rows import KeptRows
from moadapt_tasks.metrics.rows import check_text_rows


@TEXT_METRICS.register("meteor")
class METEOR(KeptRows):
    """METEOR of a corpus of captions; needs Java and the package's extra `java`.

    All captions are kept until the end, when each process runs the program over those of all processes.

    Args:
        **kwargs: Options of every torchmetrics metric.

    Raises:
        ValueError: `pycocoevalcap` or Java is missing.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        require_java("METEOR")

    def update(self, preds: list[str], references: list[list[str]]) -> None:
        """Add captions.

        Args:
            preds: B predicted captions.
            references: The references of each, at least one.

        Raises:
            ValueError: The lengths differ or a row has no references.
        """
        check_text_rows(preds, references, "references")
        self.keep(tokenised(preds, references))

    def compute(self) -> Tensor:
        """Return the corpus's score, 0 to 1; nan where no captions were given."""
        from pycocoevalcap.meteor.meteor import Meteor

        rows = self.kept()
        return self.number(corpus_score(Meteor(), rows) if rows else math.nan)
