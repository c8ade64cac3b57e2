"""Routing by top-p: the fewest experts that together reach a probability.

Huang et al., "Harder Tasks Need More Experts", section 3.2: inputs that the router is sure of get few experts.
"""

from dataclasses import dataclass

from torch import Tensor

from moadapt.registry import ROUTERS
from moadapt.router import RoutingContext
from moadapt.routing import Routing
from moadapt_routers.logit_router import LogitRouterSpec


@ROUTERS.register("top_p")
@dataclass(frozen=True, kw_only=True)
class TopP(LogitRouterSpec):
    """The smallest set of experts whose probability reaches p, and their probabilities scaled to sum to 1.

    Args:
        p: Above 0, at most 1; 1 is softmax.

    Raises:
        ValueError: p is out of range.
    """

    p: float = 0.7

    def __post_init__(self) -> None:
        """Check the range."""
        super().__post_init__()
        if not 0 < self.p <= 1:
            raise ValueError(f"TopP got p={self.p}; it must be above 0 and at most 1")

    def choose(self, logits: Tensor, context: RoutingContext, *, training: bool) -> Routing:
        """Return dense weights, those outside the set 0."""
        probabilities = logits.softmax(-1)
        ordered, order = probabilities.detach().sort(dim=-1, descending=True)
        before = ordered.cumsum(-1) - ordered
        kept = probabilities.new_zeros(probabilities.shape).scatter(-1, order, (before < self.p).to(ordered))
        weights = probabilities * kept
        return Routing(weights / weights.sum(-1, keepdim=True), logits.shape[-1])
