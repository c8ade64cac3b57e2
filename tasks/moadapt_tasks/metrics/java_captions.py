"""Caption metrics that are Java programs, run through the optional package `pycocoevalcap`."""

import importlib.util
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Protocol

from moadapt_tasks.metrics.caption_tokens import spaced_caption_tokens
from moadapt_tasks.metrics.kept_rows import KeptRows
from moadapt_tasks.metrics.rows import check_text_rows


class Program(Protocol):
    """A scorer of `pycocoevalcap`; captions stand under their images' identifiers."""

    def compute_score(self, gts: Mapping[int, list[str]], res: Mapping[int, list[str]]) -> tuple[float, Any]:
        """Return the corpus's score, and one entry a caption."""


def require_java(metric: str) -> Path:
    """Require what a metric's program needs before any text is generated for it.

    Args:
        metric: Its name, for the message.

    Returns:
        The folder of `pycocoevalcap`.

    Raises:
        ValueError: The package is not installed, or there is no Java.
    """
    package = importlib.util.find_spec("pycocoevalcap")
    if package is None or not package.submodule_search_locations:
        raise ValueError(f"{metric} runs through pycocoevalcap; run `pip install moadapt[java]`")
    if shutil.which("java") is None:
        raise ValueError(f"{metric} runs on Java; install it (Debian: `apt-get install default-jre-headless`)")
    return Path(next(iter(package.submodule_search_locations)))


def tokenised(preds: Sequence[str], references: Sequence[Sequence[str]]) -> list[list[str]]:
    """Return each row's prediction and references with spaces between words, as the programs are given them."""
    return [
        [" ".join(spaced_caption_tokens(text)) for text in (pred, *texts)]
        for pred, texts in zip(preds, references, strict=True)
    ]


def corpus_score(program: Program, rows: Sequence[Sequence[str]]) -> float:
    """Run a program.

    Args:
        program: What scores captions.
        rows: Prediction and references of each image, as `tokenised` returns them; at least one.
    """
    preds = {row: [pred] for row, (pred, *_) in enumerate(rows)}
    references = {row: list(texts) for row, (_, *texts) in enumerate(rows)}
    score, _ = program.compute_score(references, preds)
    return float(score)


class JavaCaptions(KeptRows):
    """Captions kept until the end, when each process runs a program over those of all processes.

    Args:
        **kwargs: Options of every torchmetrics metric.

    Raises:
        ValueError: `pycocoevalcap`, Java or what else the program needs is missing.
    """

    label: ClassVar[str]
    """What the metric is called, for messages."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.require(require_java(self.label))

    def require(self, package: Path) -> None:
        """Require what the program needs beside the package and Java; nothing by itself.

        Args:
            package: The folder of `pycocoevalcap`.
        """

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
