"""Merge for all inputs at once: each site gets its mean routing over calibration rows."""

from dataclasses import dataclass

from moadapt.merging.method import Blend, MergeMethod, Merging
from moadapt.registry import MERGES


@MERGES.register("mean_routing")
@dataclass(frozen=True, kw_only=True)
class MeanRouting(MergeMethod):
    """Weighs each expert as the routers do on average."""

    def prepare(self, merging: Merging) -> Blend:
        """Average the routing."""
        return Blend(merging.by_site(merging.weights()))
