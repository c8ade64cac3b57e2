"""The same share for every task."""

from collections.abc import Mapping
from dataclasses import dataclass

from moadapt.registry import SAMPLERS
from moadapt.sampling.sampler import Known, Sampler


@SAMPLERS.register("uniform")
@dataclass(frozen=True, kw_only=True)
class Uniform(Sampler):
    """Equal shares, however many rows a task has."""

    def shares(self, sizes: Mapping[str, int], step: int, known: Known) -> Mapping[str, float]:
        """Return ones."""
        return dict.fromkeys(sizes, 1.0)
