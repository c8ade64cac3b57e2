"""Load balance: all experts shall be used alike.

Fedus et al., "Switch Transformers", section 2.2: `E sum_e f_e p_e`, with f_e the share of choices that fall on expert
e and p_e its mean probability. It is 1 where both are even, and E where one expert gets everything. Gradients go
through p alone, as choices have none.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from moadapt.objectives.objective import RoutingObjective
from moadapt.registry import OBJECTIVES
from moadapt.routed import Routed


@OBJECTIVES.register("load_balance")
@dataclass(frozen=True, kw_only=True)
class LoadBalance(RoutingObjective):
    """Even use of all experts, from 1 to E."""

    def sums(self, routed: Routed) -> Tensor:
        """Return the choices and the probabilities of each expert, and the number of inputs, (2 E + 1,)."""
        chosen, probabilities = routed.total(routed.chosen.to(routed.weights)), routed.total(routed.probabilities)
        return torch.cat([chosen, probabilities, routed.count.reshape(1)])

    def value(self, sums: Tensor, routed: Routed) -> Tensor:
        """Return `E sum_e f_e p_e`."""
        experts = routed.num_experts
        chosen, probabilities, count = sums[:experts].detach(), sums[experts:-1], sums[-1]
        return experts * torch.dot(chosen / chosen.sum().clamp(min=1), probabilities / count.clamp(min=1))
