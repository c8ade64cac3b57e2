"""Dense routing: a linear map of the features and a softmax over all experts.

Shazeer et al., "Outrageously Large Neural Networks", section 2.1, softmax gating. Computed in float32; the map starts
small, so that training begins near the plain average of the experts but not at it: experts that start equal, as vectors
of zeros do, would get equal gradients and stay equal.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch.nn import functional

from moadapt.registry import ROUTERS
from moadapt.router import Router, RouterSpec, RoutingContext, Scope, mask_unavailable
from moadapt.routing import Routing
from moadapt_routers.logit_map import LogitMap


@ROUTERS.register("softmax")
@dataclass(frozen=True, kw_only=True)
class Softmax(RouterSpec):
    """All experts, blended by a learned softmax.

    Args:
        temperature: Divides the logits, above 0; lower is sharper.

    Raises:
        ValueError: The temperature is not above 0.
    """

    temperature: float = 1.0

    def __post_init__(self) -> None:
        """Check the range."""
        super().__post_init__()
        if not self.temperature > 0:
            raise ValueError(f"Softmax got temperature={self.temperature}; it must be above 0")

    def build(self, dim: int, num_experts: int) -> "SoftmaxRouter":
        """Build the router of one place."""
        return SoftmaxRouter(dim, num_experts, self.scope, self.temperature)


class SoftmaxRouter(Router):
    """A linear map and a softmax.

    Args:
        dim: D.
        num_experts: E.
        scope: Whether sequences or tokens are routed.
        temperature: Divides the logits.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"hidden"})

    def __init__(self, dim: int, num_experts: int, scope: Scope, temperature: float) -> None:
        super().__init__()
        self.scope, self.temperature = scope, temperature
        self.linear = LogitMap(dim, num_experts, spread=0.02)

    def forward(self, context: RoutingContext) -> Routing:
        """Return dense weights, (B, 1, 1, E) or (B, T, 1, E)."""
        logits = self.linear(context, self.scope) / self.temperature
        weights = functional.softmax(mask_unavailable(logits, context.available), dim=-1)
        return Routing(weights, weights.shape[-1], logits=logits)

    def grow(self, count: int) -> None:
        """Add experts with small logits."""
        self.linear.grow(count)

    def trim(self, keep: Sequence[int]) -> None:
        """Keep these experts' logits."""
        self.linear.trim(keep)
