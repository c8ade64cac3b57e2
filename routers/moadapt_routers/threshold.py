"""Routing by score and threshold: every expert that scores above a learned bar, weighed by how far; maybe none.

After DynamicControl (2024), which keeps the conditions whose score passes a learned threshold:
`w_e = relu(s_e - theta) / max(sum_f relu(s_f - theta), 1)`, with one theta a place. Weights sum to 1 where scores pass
theta by 1 in all; by less they fade to 0 and do not jump there, which rounding could make them do. Axes: E experts.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from moadapt.registry import ROUTERS
from moadapt.router import RoutingContext
from moadapt.routing import Routing
from moadapt_routers.logit_map import LogitMap
from moadapt_routers.logit_router import LogitRouterSpec

_FAR = 1e4
"""A bar as high as this shuts all experts out, one as low lets all in, and scores can still be told apart."""


@ROUTERS.register("threshold")
@dataclass(frozen=True, kw_only=True)
class Threshold(LogitRouterSpec):
    """As many experts as score above a learned threshold; where none does, only the shared adapter acts.

    What falls below the threshold for all inputs gets no gradient from the task loss any more; the objective
    `utility_ranking` teaches its scores all the same.

    Args:
        threshold: Where theta begins, a finite number; scores begin near 0.

    Raises:
        ValueError: The threshold is not finite.
    """

    threshold: float = -1.0

    sums_to_one: ClassVar[bool] = False

    def __post_init__(self) -> None:
        """Check the number."""
        super().__post_init__()
        if not math.isfinite(self.threshold):
            raise ValueError(f"Threshold got threshold={self.threshold}; it must be finite, scores begin near 0")

    def logit_map(self, dim: int, num_experts: int) -> LogitMap:
        """Build the map to scores and the threshold."""
        return ThresholdMap(dim, num_experts, self.threshold)

    def choose(self, logits: Tensor, context: RoutingContext, *, training: bool) -> Routing:
        """Return dense weights, those of scores below the threshold 0."""
        above = logits.clamp(min=0)
        return Routing(above / above.sum(-1, keepdim=True).clamp(min=1), logits.shape[-1])


class ThresholdMap(LogitMap):
    """Linear map to scores, less a threshold that all experts share.

    Args:
        dim: D.
        num_experts: E.
        threshold: Where it begins.
    """

    def __init__(self, dim: int, num_experts: int, threshold: float) -> None:
        super().__init__(dim, num_experts)
        self.threshold = nn.Parameter(torch.tensor(float(threshold)))

    def forward(self, features: Tensor) -> Tensor:
        """Return how far scores are above the threshold, (..., E), of features (..., D)."""
        return super().forward(features) - self.threshold.float().clamp(-_FAR, _FAR)
