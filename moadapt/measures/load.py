"""Load: what every expert gets of all weights."""

import torch
from torch import Tensor
from torchmetrics import Metric

from moadapt.routed import Routed


class Load(Metric):
    """The share of each expert in all that was routed, (E,), summing to 1.

    Args:
        num_experts: E.
    """

    given: Tensor

    def __init__(self, num_experts: int) -> None:
        super().__init__()
        self.add_state("given", torch.zeros(num_experts), dist_reduce_fx="sum")

    def update(self, routed: Routed) -> None:
        """Count inputs.

        Args:
            routed: The inputs that one place routed.
        """
        self.given += routed.total(routed.shares)

    def compute(self) -> Tensor:
        """Return the shares; not a number where nothing was routed."""
        return self.given / self.given.sum()
