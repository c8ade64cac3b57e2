"""Utility ranking: routers shall rank experts by what each of them is worth to a row.

After the teacher of DynamicControl (2024). The utility of an expert to a row is measured: `u_e = L_0 - L_e`, the row's
mean loss with the shared adapter alone, less that with the expert beside it at weight 1. The value is the mean over
inputs of `KL(softmax(u / t) || softmax(s / t))`, with s the router's logits: 0 where order and gaps agree. Axes: N
inputs, E experts.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from moadapt.objectives.objective import RoutingObjective
from moadapt.registry import OBJECTIVES
from moadapt.routed import Routed


@OBJECTIVES.register("utility_ranking")
@dataclass(frozen=True, kw_only=True)
class UtilityRanking(RoutingObjective):
    """Distance from the measured worth of experts to what routers think of them; costs E + 1 passes a step.

    Args:
        temperature: Divides utilities, in nats a token, and logits, above 0; lower counts the best expert alone.

    Raises:
        ValueError: The temperature is not above 0.
    """

    temperature: float = 1.0

    needs_utilities: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Check the range."""
        super().__post_init__()
        if not self.temperature > 0:
            raise ValueError(f"UtilityRanking got temperature={self.temperature}; it must be above 0")

    def sums(self, routed: Routed) -> Tensor:
        """Return the summed distances and the number of inputs, (2,)."""
        logits, utilities = routed.logits, routed.utilities
        if logits is None or utilities is None:
            what = "routers that give logits" if logits is None else "measured utilities, as training gives them"
            raise ValueError(f"UtilityRanking needs {what}; choose another router, or leave it out")
        wanted, found = ((each / self.temperature).log_softmax(-1) for each in (utilities.to(logits), logits))
        apart = (wanted.exp() * (wanted - found)).sum(-1)
        return torch.stack([routed.total(apart), routed.count])

    def value(self, sums: Tensor, routed: Routed) -> Tensor:
        """Return the mean."""
        return sums[0] / sums[1].clamp(min=1)
