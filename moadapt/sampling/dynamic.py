"""Shares that follow what validations find: a task that is behind gets more rows.

Gottumukkala et al., "Dynamic Sampling Strategies for Multi-Task Reading Comprehension" (2020): a task's share is in
proportion to the gap between its score and the score that it reaches when it is trained alone. Here a score's gap is
relative to that goal, `max(0, 1 - score / goal)`; a loss has the gap `loss / goal`, where without a goal that of the
first validation stands in its place, so that the gap is the part of the loss that training has not yet taken away.
Shares are equal until the first validation, and every task keeps part of an equal share, so that none is forgotten.
"""

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from moadapt.registry import SAMPLERS
from moadapt.sampling.sampler import Known, Sampler

_LOG = logging.getLogger(__name__)


@SAMPLERS.register("dynamic")
@dataclass(frozen=True, kw_only=True)
class Dynamic(Sampler):
    """Shares that follow each task's validation loss or score: the further behind, the more rows.

    Args:
        by: `loss`, which every validation then measures beside its scores, or the task's primary `score`.
        goals: Loss or score of each task to compare with, above 0, such as what it reaches alone; by default a loss is
            compared with that of the first validation, and a score with 1.
        power: What gaps are raised to, from 0, where shares are equal, to `.inf`, where the largest gap gets all.
        floor: Part of an equal share that every task keeps, from 0 to 1.

    Raises:
        ValueError: A number is out of range, or `by` is something else.
    """

    by: Literal["loss", "score"] = "loss"
    goals: dict[str, float] | None = None
    power: float = 1.0
    floor: float = 0.2

    def __post_init__(self) -> None:
        """Check the settings."""
        if self.by not in ("loss", "score"):
            raise ValueError(f"by is {self.by!r}; give loss or score")
        wrong = {name: goal for name, goal in (self.goals or {}).items() if not 0 < goal < math.inf}
        if wrong:
            raise ValueError(f"goals are {wrong}; give finite losses or scores above 0")
        if not self.power >= 0 or not 0 <= self.floor <= 1:
            raise ValueError(f"power is {self.power} and floor {self.floor}; give a power from 0, a floor from 0 to 1")

    @property
    def reads(self) -> Literal["loss", "score"]:
        """The loss or the score."""
        return self.by

    def shares(self, sizes: Mapping[str, int], step: int, known: Known) -> Mapping[str, float]:
        """Return the gaps' powers, mixed with equal shares; a task that no validation showed gets the mean of them.

        Raises:
            ValueError: A goal is of no task.
        """
        strange = sorted(set(self.goals or {}) - set(sizes))
        if strange:
            raise ValueError(f"goals are given for {strange}, which are no tasks; the tasks are {list(sizes)}")
        gaps = {name: self._gap(name, value, known) for name, value in known.get("last", {}).items()}
        largest = max(gaps.values(), default=0.0)
        if not largest:
            return dict.fromkeys(sizes, 1.0)
        powers = {name: (gap / largest) ** self.power for name, gap in gaps.items()}  # to 1, so that none overflows
        mean = sum(powers.values()) / len(powers)
        return {name: self.floor + (1 - self.floor) * powers.get(name, mean) / mean for name in sizes}

    def follow(self, known: Known, found: Mapping[str, float]) -> Known:
        """Remember every task's first and last finite number; what is none is told in a warning."""
        wild = {name: value for name, value in found.items() if not math.isfinite(value)}
        if wild:
            _LOG.warning("the validation found %s for the %s; shares follow what was found before it", wild, self.by)
        finite = {name: value for name, value in found.items() if name not in wild}
        first, last = known.get("first", {}), known.get("last", {})
        return {"first": {**finite, **first}, "last": {**last, **finite}}

    def _gap(self, name: str, value: float, known: Known) -> float:
        goal = (self.goals or {}).get(name)
        if self.by == "score":
            return max(0.0, 1 - value / (goal or 1.0))
        goal = goal or known["first"][name]
        return max(0.0, value / goal) if goal > 0 else 0.0
