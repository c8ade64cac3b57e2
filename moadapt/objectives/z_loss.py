"""Router z-loss: logits shall stay small, so that their softmax neither overflows nor freezes.

Zoph et al., "ST-MoE: Designing Stable and Transferable Sparse Expert Models", section 3.3: the mean over inputs of
`(log sum_e exp l_e)^2`. A softmax does not change when a number is added to all its logits, but this does.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from moadapt.objectives.objective import RoutingObjective
from moadapt.registry import OBJECTIVES
from moadapt.routed import Routed


@OBJECTIVES.register("z_loss")
@dataclass(frozen=True, kw_only=True)
class ZLoss(RoutingObjective):
    """Small logits, so that routers keep learning: the mean squared logsumexp, from 0."""

    weight: float = 1e-3

    def sums(self, routed: Routed) -> Tensor:
        """Return the squared logsumexps and the number of inputs, (2,).

        Raises:
            ValueError: The router gives no logits.
        """
        if routed.logits is None:
            raise ValueError("ZLoss judges logits, and this mixture's router gives none; leave the objective out")
        return torch.stack([routed.total(routed.logits.logsumexp(-1).square()), routed.count])

    def value(self, sums: Tensor, routed: Routed) -> Tensor:
        """Return the mean."""
        return sums[0] / sums[1].clamp(min=1)
