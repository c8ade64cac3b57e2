"""Merge that asks no router: every expert counts the same."""

from dataclasses import dataclass
from typing import ClassVar

from moadapt.merging.method import Blend, MergeMethod, Merging
from moadapt.registry import MERGES


@MERGES.register("uniform")
@dataclass(frozen=True, kw_only=True)
class Uniform(MergeMethod):
    """Weighs all experts alike, with a sum of 1."""

    reads_rows: ClassVar[bool] = False

    def prepare(self, merging: Merging) -> Blend:
        """Give every expert the same weight."""
        even = merging.even()
        return Blend(merging.by_site({place.name: even for place in merging.mixture.places}))
