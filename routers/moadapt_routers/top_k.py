"""Sparse routing: the k experts of highest logit, weighted by a softmax over just those.

Shazeer et al., "Outrageously Large Neural Networks", section 2.1, without noise. Logits start small and random, so
that no two experts tie for every input.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch.nn import functional

from moadapt.registry import ROUTERS
from moadapt.router import Router, RouterSpec, RoutingContext, Scope, mask_unavailable
from moadapt.routing import Routing
from moadapt_routers.logit_map import LogitMap


@ROUTERS.register("top_k")
@dataclass(frozen=True, kw_only=True)
class TopK(RouterSpec):
    """The k best experts of each input, blended by a softmax over them.

    Args:
        k: How many experts an input gets, 1 to E. With 1 the weight is always 1 and the router gets no gradient from
            the task.

    Raises:
        ValueError: k is below 1, or above the number of experts (at build).
    """

    k: int = 2

    def __post_init__(self) -> None:
        """Check the range."""
        super().__post_init__()
        if self.k < 1:
            raise ValueError(f"TopK got k={self.k}; it must be at least 1")

    def build(self, dim: int, num_experts: int) -> "TopKRouter":
        """Build the router of one place."""
        if self.k > num_experts:
            raise ValueError(f"TopK got k={self.k}, but there are {num_experts} experts; choose k of at most that")
        return TopKRouter(dim, num_experts, self.scope, self.k)


class TopKRouter(Router):
    """A linear map, the k largest logits and a softmax over them.

    Args:
        dim: D.
        num_experts: E.
        scope: Whether sequences or tokens are routed.
        k: K.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"hidden"})

    def __init__(self, dim: int, num_experts: int, scope: Scope, k: int) -> None:
        super().__init__()
        self.scope, self.k = scope, k
        self.linear = LogitMap(dim, num_experts, spread=0.02)

    def forward(self, context: RoutingContext) -> Routing:
        """Return sparse weights, (B, 1, 1, K) or (B, T, 1, K), with their indices."""
        logits = self.linear(context, self.scope)
        best, indices = mask_unavailable(logits, context.available).topk(self.k, dim=-1)
        return Routing(functional.softmax(best, dim=-1), logits.shape[-1], indices, logits=logits)

    def grow(self, count: int) -> None:
        """Add experts with small random logits."""
        self.linear.grow(count)

    def trim(self, keep: Sequence[int]) -> None:
        """Keep these experts' logits.

        Raises:
            ValueError: Fewer than k would be left.
        """
        if len(keep) < self.k:
            raise ValueError(f"top-{self.k} routing cannot go on with {len(keep)} experts; keep at least {self.k}")
        self.linear.trim(keep)
