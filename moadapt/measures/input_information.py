"""Mutual information of input and expert: how far routers tell inputs apart, in nats.

`H(E s) - E H(s)`, with s the shares of an input's weights: 0 where all inputs are routed alike, ln E where each has one
expert to itself and the experts are used alike.
"""

import torch
from torch import Tensor
from torchmetrics import Metric

from moadapt.routed import Routed, entropy


class InputInformation(Metric):
    """What an input tells about its experts, from 0 to ln E.

    Args:
        num_experts: E.
    """

    given: Tensor
    entropies: Tensor
    count: Tensor

    def __init__(self, num_experts: int) -> None:
        super().__init__()
        self.add_state("given", torch.zeros(num_experts), dist_reduce_fx="sum")
        self.add_state("entropies", torch.tensor(0.0), dist_reduce_fx="sum")
        self.add_state("count", torch.tensor(0.0), dist_reduce_fx="sum")

    def update(self, routed: Routed) -> None:
        """Count inputs; those that got nothing do not.

        Args:
            routed: The inputs that one place routed.
        """
        self.given += routed.total(routed.shares)
        self.entropies += routed.total(entropy(routed.shares))
        self.count += routed.total(routed.shares.sum(-1))

    def compute(self) -> Tensor:
        """Return the information; not a number where nothing was routed."""
        return (entropy(self.given / self.count) - self.entropies / self.count).clamp(min=0)
