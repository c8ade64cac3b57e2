"""Tasks take turns in the order in which they are given.

Where batches hold one task, step s is one of task `s mod T`. Equal shares, as `uniform` gives them, but the order is
the user's and not a random one, and where a budget of tokens makes batches of unequal numbers of rows, batches are
counted and not rows.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from moadapt.registry import SAMPLERS
from moadapt.sampling.sampler import Known, Sampler


@SAMPLERS.register("round_robin")
@dataclass(frozen=True, kw_only=True)
class RoundRobin(Sampler):
    """One turn after the other, in the order of the tasks."""

    in_order: ClassVar[bool] = True

    def shares(self, sizes: Mapping[str, int], step: int, known: Known) -> Mapping[str, float]:
        """Return ones."""
        return dict.fromkeys(sizes, 1.0)
