"""Switch routing: the one best expert, weighted by its probability, with room for so many tokens a row.

Fedus et al., "Switch Transformers", section 2.1-2.2. Capacity counts the real tokens of a row in position order, and
grows with them: expert e has taken at most `ceil(capacity * (t + 1) / E)` of the first t + 1. So what becomes of a
token depends on its past alone. Only training drops tokens.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from moadapt.registry import ROUTERS
from moadapt.router import RoutingContext
from moadapt.routing import Routing
from moadapt_routers.logit_router import LogitRouterSpec


@ROUTERS.register("switch")
@dataclass(frozen=True, kw_only=True)
class Switch(LogitRouterSpec):
    """The best expert of each input, weighted by its probability, through which the router learns.

    Args:
        capacity: How many times its even share of a row's tokens an expert takes in training, above 0; the others
            get weight 0, and only the shared adapter acts on them. None drops nothing. By sequence nothing is dropped.

    Raises:
        ValueError: The capacity is not above 0.
    """

    capacity: float | None = 1.25

    sums_to_one: ClassVar[bool] = False

    def __post_init__(self) -> None:
        """Check the range."""
        super().__post_init__()
        if self.capacity is not None and not self.capacity > 0:
            raise ValueError(f"Switch got capacity={self.capacity}; it must be above 0, or None")

    def choose(self, logits: Tensor, context: RoutingContext, *, training: bool) -> Routing:
        """Return one weight and index an input, (B, 1|T, 1, 1); of a dropped token the weight is 0."""
        weights, indices = logits.softmax(-1).max(dim=-1, keepdim=True)
        if training and self.capacity is not None and self.scope == "token":
            weights = weights * self._taken(indices, logits.shape[-1], context)
        return Routing(weights, logits.shape[-1], indices)

    def _taken(self, indices: Tensor, num_experts: int, context: RoutingContext) -> Tensor:
        """Tell which tokens find room, (B, T, 1, 1)."""
        chosen, real = torch.nn.functional.one_hot(indices[:, :, 0, 0], num_experts), context.real
        counted = torch.ones_like(chosen[..., 0]) if real is None else real.long()
        rows = context.rows if context.rows is not None and len(chosen) == 1 else None  # patches, in one axis
        taken = _so_far(chosen * counted.unsqueeze(-1), rows).gather(2, indices[:, :, 0])
        assert self.capacity is not None, "asked only where there is one"
        room = torch.ceil(_so_far(counted.unsqueeze(-1), rows).squeeze(-1) * self.capacity / num_experts)
        return (taken <= room.unsqueeze(-1)).unsqueeze(-1)


def _so_far(counts: Tensor, rows: Tensor | None) -> Tensor:
    """Add up along tokens, (B, T, E), anew for each row where several rows lie in one axis, one after the other."""
    sums = counts.cumsum(dim=1)
    if rows is None or len(rows) != counts.shape[1]:
        return sums
    first = torch.searchsorted(rows, rows)  # the first token of each token's row
    return sums - (sums - counts)[:, first]
