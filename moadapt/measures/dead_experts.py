"""Dead experts: those that hardly any weight goes to."""

import torch
from torch import Tensor
from torchmetrics import Metric

from moadapt.routed import Routed


class DeadExperts(Metric):
    """The share of experts whose load is below a part of what an even split would give them, from 0 to 1.

    Args:
        num_experts: E.
        below: That part.
    """

    given: Tensor

    def __init__(self, num_experts: int, below: float = 0.1) -> None:
        super().__init__()
        self.below = below
        self.add_state("given", torch.zeros(num_experts), dist_reduce_fx="sum")

    def update(self, routed: Routed) -> None:
        """Count inputs.

        Args:
            routed: The inputs that one place routed.
        """
        self.given += routed.total(routed.shares)

    def compute(self) -> Tensor:
        """Return the share; not a number where nothing was routed."""
        relative = self.given / self.given.mean()
        return torch.where(relative.isnan(), relative, (relative < self.below).to(relative)).mean()
