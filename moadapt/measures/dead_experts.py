"""Dead experts: those that hardly any weight goes to."""

import torch
from torch import Tensor

from moadapt.measures.totals import ExpertTotals


class DeadExperts(ExpertTotals):
    """The share of experts whose load is below a part of what an even split would give them, from 0 to 1.

    Args:
        num_experts: E.
        below: That part.
    """

    def __init__(self, num_experts: int, below: float = 0.1) -> None:
        super().__init__(num_experts)
        self.below = below

    def compute(self) -> Tensor:
        """Return the share; not a number where nothing was routed."""
        relative = self.given / self.given.mean()
        return torch.where(relative.isnan(), relative, (relative < self.below).to(relative)).mean()
