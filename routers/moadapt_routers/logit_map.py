"""The linear map that learned routers share: features of a place to one logit an expert, in float32."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from moadapt.router import RoutingContext, Scope


class LogitMap(nn.Module):
    """Linear map from a place's features to logits.

    Args:
        dim: D.
        num_experts: E.
        spread: Standard deviation of the initial weights; 0 starts all logits at 0.
    """

    def __init__(self, dim: int, num_experts: int, spread: float) -> None:
        super().__init__()
        self.spread = spread
        self.weight = nn.Parameter(torch.randn(num_experts, dim) * spread)
        self.bias = nn.Parameter(torch.zeros(num_experts))

    def forward(self, context: RoutingContext, scope: Scope) -> Tensor:
        """Return logits, (B, 1, 1, E) by sequence or (B, T, 1, E) by token."""
        features = context.tokens if scope == "token" else context.pooled.unsqueeze(1)
        with torch.autocast(features.device.type, enabled=False):
            return functional.linear(features, self.weight.float(), self.bias.float()).unsqueeze(2)

    def grow(self, count: int) -> None:
        """Append rows, spread as the first ones were."""
        fresh = torch.randn(count, self.weight.shape[1], device=self.weight.device) * self.spread
        self.weight = nn.Parameter(torch.cat([self.weight.detach(), fresh.to(self.weight)]))
        self.bias = nn.Parameter(torch.cat([self.bias.detach(), self.bias.new_zeros(count)]))

    def trim(self, keep: Sequence[int]) -> None:
        """Keep these rows."""
        self.weight = nn.Parameter(self.weight.detach()[list(keep)].clone())
        self.bias = nn.Parameter(self.bias.detach()[list(keep)].clone())
