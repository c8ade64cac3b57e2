"""Effective number of experts: how many an input uses, those of small weight counting little.

`(sum_e w_e)^2 / sum_e w_e^2` of an input's weights w: the effective sample size of importance sampling.
"""

import torch
from torch import Tensor
from torchmetrics import Metric

from moadapt.routed import Routed


class EffectiveExperts(Metric):
    """The mean effective number of experts of an input, from 1 to E; inputs that got nothing have none."""

    sums: Tensor
    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("sums", torch.tensor(0.0), dist_reduce_fx="sum")
        self.add_state("count", torch.tensor(0.0), dist_reduce_fx="sum")

    def update(self, routed: Routed) -> None:
        """Count inputs.

        Args:
            routed: The inputs that one place routed.
        """
        squares = routed.shares.square().sum(-1)
        self.sums += routed.total(routed.shares.sum(-1).square() / squares.clamp(min=1e-12))
        self.count += routed.count

    def compute(self) -> Tensor:
        """Return the mean; not a number where nothing was routed."""
        return self.sums / self.count
