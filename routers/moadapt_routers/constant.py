"""Constant weights: every input gets the same blend; the baseline without routing."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from moadapt.registry import ROUTERS
from moadapt.router import Router, RouterSpec, RoutingContext, Scope
from moadapt.routing import Routing


@ROUTERS.register("constant")
@dataclass(frozen=True, kw_only=True)
class Constant(RouterSpec):
    """The same weights for every input, not trained.

    Args:
        weights: One weight an expert, any finite numbers; None is 1/E each.
        per: Kept for symmetry; all places route alike.

    Raises:
        ValueError: The number of weights is not the number of experts (at build).
    """

    weights: tuple[float, ...] | None = None

    scopes: ClassVar[tuple[Scope, ...]] = ("sequence",)
    depends_on: ClassVar[Literal["nothing", "task", "input"]] = "nothing"
    alike: ClassVar[bool] = True

    def build(self, dim: int, num_experts: int) -> "ConstantRouter":
        """Build the router of one place; `dim` is not used."""
        weights = self.weights or (1 / num_experts,) * num_experts
        if len(weights) != num_experts:
            raise ValueError(f"Constant got {len(weights)} weights for {num_experts} experts; give one an expert")
        return ConstantRouter(weights)


class ConstantRouter(Router):
    """Returns its weights.

    Args:
        weights: One weight an expert.
    """

    needs: ClassVar[frozenset[str]] = frozenset()
    weights: Tensor

    def __init__(self, weights: Sequence[float]) -> None:
        super().__init__()
        self.register_buffer("weights", torch.tensor(weights, dtype=torch.float32))

    def forward(self, context: RoutingContext) -> Routing:
        """Return weights (1, 1, 1, E)."""
        weights = self.weights if context.available is None else self.weights * context.available
        return Routing.constant(weights)

    def grow(self, count: int) -> None:
        """Give new experts weight 0."""
        self.weights = torch.cat([self.weights, self.weights.new_zeros(count)])

    def trim(self, keep: Sequence[int]) -> None:
        """Keep these experts' weights."""
        self.weights = self.weights[list(keep)]
