"""Proportional, but no task counts for more than a number of rows.

Raffel et al., "Exploring the Limits of Transfer Learning with a Unified Text-to-Text Transformer", section 3.5.2,
examples-proportional mixing: the share of a task of N rows is proportional to min(N, K).
"""

from collections.abc import Mapping
from dataclasses import dataclass

from moadapt.registry import SAMPLERS
from moadapt.sampling.sampler import Known, Sampler


@SAMPLERS.register("capped")
@dataclass(frozen=True, kw_only=True)
class Capped(Sampler):
    """Shares in proportion to the tasks' rows, a task counting for no more rows than a cap (examples-proportional).

    Args:
        cap: Most rows that a task counts for, at least 1. It goes through all of its rows nevertheless, in time.

    Raises:
        ValueError: The cap is below 1.
    """

    cap: int = 2**19

    def __post_init__(self) -> None:
        """Check the cap."""
        if self.cap < 1:
            raise ValueError(f"cap is {self.cap}; give at least 1, the most rows that a task counts for")

    def shares(self, sizes: Mapping[str, int], step: int, known: Known) -> Mapping[str, float]:
        """Return the sizes, cut off at the cap."""
        return {name: min(size, self.cap) for name, size in sizes.items()}
