"""Every row of every task once an epoch."""

from collections.abc import Mapping
from dataclasses import dataclass

from moadapt.registry import SAMPLERS
from moadapt.sampling.sampler import Known, Sampler


@SAMPLERS.register("proportional")
@dataclass(frozen=True, kw_only=True)
class Proportional(Sampler):
    """Shares in proportion to the tasks' rows: every row comes once an epoch."""

    def shares(self, sizes: Mapping[str, int], step: int, known: Known) -> Mapping[str, float]:
        """Return the sizes."""
        return dict(sizes)
