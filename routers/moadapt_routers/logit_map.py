"""The maps that learned routers share: features to one logit an expert, in float32."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

_WEIGHT, _LOGIT = 0.02, 0.25
"""Standard deviation of initial weights, less where those of a wide map would give logits a larger one than this."""


class LogitMap(nn.Module):
    """Linear map from normalised features to logits, which begin small whatever the width.

    Args:
        dim: D.
        num_experts: E.
        bias: Whether each expert has a constant of its own.
    """

    bias: Tensor | None

    def __init__(self, dim: int, num_experts: int, *, bias: bool = True) -> None:
        super().__init__()
        self.spread = min(_WEIGHT, _LOGIT * dim**-0.5)
        self.weight = nn.Parameter(torch.randn(num_experts, dim) * self.spread)
        self.register_parameter("bias", nn.Parameter(torch.zeros(num_experts)) if bias else None)

    def forward(self, features: Tensor) -> Tensor:
        """Return logits, (..., E), of features (..., D)."""
        with torch.autocast(features.device.type, enabled=False):
            bias = None if self.bias is None else self.bias.float()
            return functional.linear(features.float(), self.weight.float(), bias)

    def grow(self, count: int) -> None:
        """Append rows, spread as the first ones were."""
        fresh = torch.randn(count, self.weight.shape[1], device=self.weight.device) * self.spread
        self.weight = nn.Parameter(torch.cat([self.weight.detach(), fresh.to(self.weight)]))
        if self.bias is not None:
            self.bias = nn.Parameter(torch.cat([self.bias.detach(), self.bias.new_zeros(count)]))

    def trim(self, keep: Sequence[int]) -> None:
        """Keep these rows."""
        self.weight = nn.Parameter(self.weight.detach()[list(keep)].clone())
        if self.bias is not None:
            self.bias = nn.Parameter(self.bias.detach()[list(keep)].clone())


class DeepLogitMap(LogitMap):
    """A hidden layer before the linear map.

    Args:
        dim: D.
        num_experts: E.
        width: Of the hidden layer.
    """

    def __init__(self, dim: int, num_experts: int, width: int) -> None:
        super().__init__(width, num_experts)
        self.hidden = nn.Linear(dim, width)

    def forward(self, features: Tensor) -> Tensor:
        """Return logits, (..., E), of features (..., D)."""
        with torch.autocast(features.device.type, enabled=False):
            weight, bias = self.hidden.weight.float(), self.hidden.bias.float()
            return super().forward(functional.gelu(functional.linear(features.float(), weight, bias)))
