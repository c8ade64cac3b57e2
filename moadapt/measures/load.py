"""Load: what every expert gets of all weights."""

from torch import Tensor

from moadapt.measures.totals import ExpertTotals


class Load(ExpertTotals):
    """The share of each expert in all that was routed, (E,), summing to 1."""

    def compute(self) -> Tensor:
        """Return the shares; not a number where nothing was routed."""
        return self.given / self.given.sum()
