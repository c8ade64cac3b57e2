"""NLVR2: accuracy of statements about pairs of pictures, and consistency over the pairs that share a statement.

A statement's identifier is `split-set-pair-sentence`, such as `dev-850-0-1`: identifiers that differ in their third
part alone ask the same sentence of other pictures. Consistency is the share of sentences that are right for all of
their pairs. Suhr et al. 2019 (arXiv:1811.00491); here as in the published evaluation.
"""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import TypedDict

from torch import Tensor

from moadapt_tasks.metrics.kept_rows import KeptRows
from moadapt_tasks.metrics.rows import check_keys, check_preds, check_rows


class NLVR2Reference(TypedDict):
    """What the metric needs of a row, as `Example.reference` holds it."""

    identifier: str
    """`split-set-pair-sentence`, as the data set's files have it."""
    label: str
    """`True` or `False`; case does not count."""


def sentence(identifier: str) -> str:
    """Return what identifiers of one sentence share.

    Raises:
        ValueError: The identifier has fewer than four parts.

    Example:
        >>> sentence("dev-850-0-1"), sentence("dev-850-3-1")
        ('dev-850--1', 'dev-850--1')
    """
    parts = identifier.split("-")
    if len(parts) < 4:
        raise ValueError(f"the identifier is {identifier!r}; give split-set-pair-sentence, such as dev-850-0-1")
    return "-".join([*parts[:2], "", *parts[3:]])


def nlvr2_scores(right: Mapping[str, bool]) -> dict[str, float]:
    """Return `accuracy` and `consistency`, both 0 to 1; nan without statements.

    Args:
        right: Whether each statement was judged rightly, by identifier.
    """
    if not right:
        return {"accuracy": math.nan, "consistency": math.nan}
    by_sentence: dict[str, list[bool]] = defaultdict(list)
    for identifier, judged in right.items():
        by_sentence[sentence(identifier)].append(judged)
    return {
        "accuracy": sum(right.values()) / len(right),
        "consistency": sum(all(judged) for judged in by_sentence.values()) / len(by_sentence),
    }


class NLVR2Scores(KeptRows):
    """Accuracy and consistency of judged statements, over all processes.

    A statement that is given twice counts once, as it was judged last.

    Args:
        **kwargs: Options of every torchmetrics metric.

    Example:
        >>> scores = NLVR2Scores()
        >>> truths = [{"identifier": f"dev-1-{pair}-0", "label": "True"} for pair in range(2)]
        >>> scores.update(["true", "false"], truths)
        >>> {name: value.item() for name, value in scores.compute().items()}
        {'accuracy': 0.5, 'consistency': 0.0}
    """

    def update(self, preds: list[str], references: Sequence[NLVR2Reference]) -> None:
        """Add statements.

        Args:
            preds: B judgements, `true` or `false` in any case; any other text is wrong.
            references: Identifier and label of each.

        Raises:
            ValueError: The lengths differ, a row lacks a key, or an identifier or label is none.
        """
        check_rows(preds, references, "references")
        check_preds(preds)
        check_keys(references, NLVR2Reference.__annotations__)
        for row, reference in enumerate(references):
            sentence(reference["identifier"])
            if reference["label"].lower() not in ("true", "false"):
                raise ValueError(f"references[{row}] has the label {reference['label']!r}; give True or False")
        self.keep(
            [
                (reference["identifier"], pred.lower() == reference["label"].lower())
                for pred, reference in zip(preds, references, strict=True)
            ]
        )

    def compute(self) -> dict[str, Tensor]:
        """Return `accuracy` and `consistency`, both 0 to 1; nan where no statements were given."""
        return {name: self.number(value) for name, value in nlvr2_scores(dict(self.kept())).items()}
