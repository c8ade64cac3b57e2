"""GQA: accuracy by type of question, and whether answers are consistent, valid, plausible and distributed as the truth.

Hudson and Manning 2019 (arXiv:1902.09506); here as in the published evaluation, whose metrics need no attention maps.
Of the questions of the balanced set:

- `accuracy`, the share of right answers, also as `binary` and `open` (structural type `query`), and for each type of
  question as `structural/<type>` and `semantic/<type>`;
- `consistency`: for each question that is answered rightly, the accuracy over the questions that it entails (of the
  whole set), averaged over those that entail any;
- `validity` and `plausibility`, the share of answers that such a question can have, and that make sense in the world;
- `distribution`, where less is better: the chi-square of the answers of a group of questions against the true ones,
  averaged over groups by their questions, over 100.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, Required, TypedDict

from torch import Tensor

from moadapt_tasks.metrics.kept_rows import KeptRows
from moadapt_tasks.metrics.rows import check_keys, check_preds, check_rows, is_texts

# What two objects can have in common, valid and plausible for every question that asks for it.
COMMON = ("color", "material", "shape")
_LISTS = ("entailed", "valid", "plausible")


class GQAReference(TypedDict, total=False):
    """What the metric needs of a row, as `Example.reference` holds it; what a file does not say is left out."""

    id: Required[str]
    """The question's identifier."""
    answer: Required[str]
    """Its answer, compared as it stands."""
    structural: Required[str]
    """Structural type: verify, query, choose, logical or compare (`types.structural` of the files)."""
    semantic: Required[str]
    """Semantic type: obj, attr, cat, rel or global (`types.semantic`)."""
    detailed: str
    """Detailed type (`types.detailed`)."""
    balanced: bool
    """Whether it belongs to the balanced set (`isBalanced`), which is so by default."""
    entailed: Sequence[str]
    """Identifiers of the questions that its answer settles (`entailed`)."""
    group: str | None
    """Its group of questions (`groups.global`)."""
    valid: Sequence[str]
    """Answers that it can have, from the choices file."""
    plausible: Sequence[str]
    """Answers that make sense in the world, from the choices file."""


class Judged(NamedTuple):
    """What is kept of an answered question, and nothing where the file does not tell."""

    id: str
    pred: str
    answer: str
    structural: str
    semantic: str
    balanced: bool
    entailed: Sequence[str]
    group: str | None
    valid: bool | None
    plausible: bool | None

    @property
    def right(self) -> bool:
        """Whether the answer is the true one."""
        return self.pred == self.answer


def judge(pred: str, reference: GQAReference) -> Judged:
    """Compare an answer with what is known of its question."""
    return Judged(
        reference["id"],
        pred,
        reference["answer"],
        reference["structural"],
        reference["semantic"],
        reference.get("balanced", True),
        reference.get("entailed") or (),
        reference.get("group"),
        _is_among(pred, reference, "valid"),
        _is_among(pred, reference, "plausible"),
    )


def _is_among(pred: str, reference: Mapping[str, Any], key: str) -> bool | None:
    if reference.get(key) is None:
        return None
    return pred in (COMMON if "Common" in reference.get("detailed", "") else reference[key])


def consistencies(judged: Mapping[str, Judged]) -> list[float]:
    """Return the accuracy over the entailed questions of every rightly answered one that entails any.

    Args:
        judged: All answered questions by identifier; entailed ones that are not among them do not count.
    """
    found = []
    for row in judged.values():
        entailed = [judged[other].right for other in row.entailed if other != row.id and other in judged]
        if row.balanced and row.right and entailed:
            found.append(_mean(entailed))
    return found


def distribution(judged: Iterable[Judged]) -> float:
    """Return how far the answers' distribution is from the true one, 0 if it is the same; nan without groups."""
    true: dict[str, Counter[str]] = defaultdict(Counter)
    given: dict[str, Counter[str]] = defaultdict(Counter)
    for row in judged:
        if row.group is not None:
            true[row.group][row.answer] += 1
            given[row.group][row.pred] += 1
    weighed = questions = 0.0
    for group, answers in true.items():
        chi_square = math.fsum((given[group][answer] - count) ** 2 / count for answer, count in answers.items())
        weighed += chi_square * answers.total()
        questions += answers.total()
    return weighed / questions / 100 if questions else math.nan


def gqa_scores(judged: Mapping[str, Judged]) -> dict[str, float]:
    """Return all scores, nan where no question says what a score needs.

    Args:
        judged: All answered questions by identifier.
    """
    rows = [row for row in judged.values() if row.balanced]
    by_type: dict[str, list[bool]] = {"accuracy": [row.right for row in rows], "binary": [], "open": []}
    for row in rows:
        by_type["open" if row.structural == "query" else "binary"].append(row.right)
    for row in sorted(rows, key=lambda row: (row.structural, row.semantic)):
        by_type.setdefault(f"structural/{row.structural}", []).append(row.right)
        by_type.setdefault(f"semantic/{row.semantic}", []).append(row.right)
    return {
        **{name: _mean(right) for name, right in by_type.items()},
        "consistency": _mean(consistencies(judged)),
        "validity": _mean([row.valid for row in rows if row.valid is not None]),
        "plausibility": _mean([row.plausible for row in rows if row.plausible is not None]),
        "distribution": distribution(rows),
    }


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values) if values else math.nan


class GQAScores(KeptRows):
    """The scores of the published GQA evaluation, over all processes.

    Answers are compared as they stand; lower case and no full stop are for a task's `parse` to make. Shares are 0 to 1,
    where that evaluation prints percent. A question that is given twice counts once, with its last answer.

    Args:
        **kwargs: Options of every torchmetrics metric.

    Example:
        >>> scores = GQAScores()
        >>> asked = [
        ...     {"id": "1", "answer": "red", "structural": "query", "semantic": "attr", "entailed": ["2"]},
        ...     {"id": "2", "answer": "yes", "structural": "verify", "semantic": "attr"},
        ... ]
        >>> scores.update(["red", "no"], asked)
        >>> found = {name: value.item() for name, value in scores.compute().items()}
        >>> found["accuracy"], found["structural/verify"], found["consistency"]
        (0.5, 0.0, 0.0)
    """

    def update(self, preds: list[str], references: Sequence[GQAReference]) -> None:
        """Add questions.

        Args:
            preds: B predicted answers.
            references: What is known of each question, as `GQAReference` says.

        Raises:
            ValueError: The lengths differ, a row lacks a key that all need, or a list is none.
        """
        check_rows(preds, references, "references")
        check_preds(preds)
        check_keys(references, sorted(GQAReference.__required_keys__))
        for row, reference in enumerate(references):
            for key in _LISTS:
                if not is_texts(reference.get(key) or ()):
                    raise ValueError(f"references[{row}] has {reference.get(key)!r} under {key!r}; give a list of str")
        self.keep([judge(pred, reference) for pred, reference in zip(preds, references, strict=True)])

    def compute(self) -> dict[str, Tensor]:
        """Return every score by name; nan where no question says what it needs, types that no question has left out."""
        judged = {row.id: row for row in (Judged(*values) for values in self.kept())}
        return {name: self.number(value) for name, value in gqa_scores(judged).items()}
