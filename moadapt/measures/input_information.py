"""Mutual information of input and expert: how far routers tell inputs apart, in nats.

`H(E s) - E H(s)`, with s the shares of an input's weights: 0 where all inputs are routed alike, ln E where each has one
expert to itself and the experts are used alike.
"""

import torch
from torch import Tensor

from moadapt.measures.totals import ExpertTotals
from moadapt.routed import Routed, entropy


class InputInformation(ExpertTotals):
    """What an input tells about its experts, from 0 to ln E; inputs that got nothing do not count.

    Args:
        num_experts: E.
    """

    entropies: Tensor

    def __init__(self, num_experts: int) -> None:
        super().__init__(num_experts)
        self.add_state("entropies", torch.tensor(0.0), dist_reduce_fx="sum")

    def update(self, routed: Routed) -> None:
        """Count inputs.

        Args:
            routed: The inputs that one place routed.
        """
        super().update(routed)
        self.entropies += routed.total(entropy(routed.shares))

    def compute(self) -> Tensor:
        """Return the information; not a number where nothing was routed."""
        count = self.given.sum()  # shares of an input sum to 1
        return (entropy(self.given / count) - self.entropies / count).clamp(min=0)
