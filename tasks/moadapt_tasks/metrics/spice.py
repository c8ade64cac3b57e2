"""SPICE: how many of the objects, attributes and relations that a caption tells its references tell as well.

Anderson et al. 2016 (arXiv:1607.08822), as the public COCO caption evaluation runs it. It is a program for Java 8 or 11
(newer versions forbid what it does), which the optional package `pycocoevalcap` brings along: `pip install
moadapt[java]`. The models of its parser come from elsewhere, once: `python -m pycocoevalcap.spice.get_stanford_models`.
"""

import math
import subprocess
from pathlib import Path
from typing import ClassVar

from torch import Tensor

from moadapt.registry import TEXT_METRICS
from moadapt_tasks.metrics.java_captions import JavaCaptions, corpus_score

PARSER = "spice/lib/stanford-corenlp-3.6.0.jar"


@TEXT_METRICS.register("spice")
class SPICE(JavaCaptions):
    """Mean SPICE of captions; needs Java 8 or 11, the package's extra `java` and the parser's models.

    All captions are kept until the end, when each process runs the program over those of all processes.

    Args:
        **kwargs: Options of every torchmetrics metric.

    Raises:
        ValueError: `pycocoevalcap`, Java or the parser is missing.
    """

    label: ClassVar[str] = "SPICE"

    def require(self, package: Path) -> None:
        """Require the parser."""
        if not (package / PARSER).is_file():
            raise ValueError(
                f"SPICE's parser is not at {package / PARSER}; download it once, with its models of about 400 MB: "
                "`python -m pycocoevalcap.spice.get_stanford_models`"
            )

    def compute(self) -> Tensor:
        """Return the mean over captions, 0 to 1; nan where no captions were given.

        Raises:
            RuntimeError: The program failed, as it does on Java 16 and newer.
        """
        from pycocoevalcap.spice.spice import Spice

        rows = self.kept()
        try:
            return self.number(corpus_score(Spice(), rows) if rows else math.nan)
        except subprocess.CalledProcessError as error:
            raise RuntimeError(
                f"SPICE's program ended with {error.returncode}; it said why above. It runs on Java 8 or 11: see what "
                "`java -version` says, and put one of these first on the PATH"
            ) from error
