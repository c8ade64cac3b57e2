"""Entropy of an input's weights: how many experts share it, in nats."""

import torch
from torch import Tensor
from torchmetrics import Metric

from moadapt.routed import Routed, entropy


class RoutingEntropy(Metric):
    """The mean entropy of the weights that an input got, from 0, one expert alone, to ln E, all alike."""

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
        self.sums += routed.total(entropy(routed.shares))
        self.count += routed.count

    def compute(self) -> Tensor:
        """Return the mean; not a number where nothing was routed."""
        return self.sums / self.count
