"""METEOR: how well a caption's words align with a reference's, equal, of one stem, synonyms or paraphrases.

Denkowski and Lavie 2014, version 1.5, as the public COCO caption evaluation runs it. It is a Java program, which the
optional package `pycocoevalcap` brings along: `pip install moadapt[java]`.
"""

import math
from typing import ClassVar

from torch import Tensor

from moadapt.registry import TEXT_METRICS
from moadapt_tasks.metrics.java_captions import JavaCaptions, corpus_score


@TEXT_METRICS.register("meteor")
class METEOR(JavaCaptions):
    """METEOR of a corpus of captions; needs Java and the package's extra `java`.

    All captions are kept until the end, when each process runs the program over those of all processes.

    Args:
        **kwargs: Options of every torchmetrics metric.

    Raises:
        ValueError: `pycocoevalcap` or Java is missing.
    """

    label: ClassVar[str] = "METEOR"

    def compute(self) -> Tensor:
        """Return the corpus's score, 0 to 1; nan where no captions were given."""
        from pycocoevalcap.meteor.meteor import Meteor

        rows = self.kept()
        return self.number(corpus_score(Meteor(), rows) if rows else math.nan)
