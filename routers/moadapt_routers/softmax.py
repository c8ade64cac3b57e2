"""Dense routing: a linear map of the features and a softmax over all experts.

Shazeer et al., "Outrageously Large Neural Networks", section 2.1, softmax gating. Computed in float32; the map starts
small, so that training begins near the plain average of the experts but not at it: experts that start equal, as vectors
of zeros do, would get equal gradients and stay equal.
"""

from dataclasses import dataclass

from torch import Tensor

from moadapt.registry import ROUTERS
from moadapt.router import RoutingContext
from moadapt.routing import Routing
from moadapt_routers.logit_router import LogitRouterSpec


@ROUTERS.register("softmax")
@dataclass(frozen=True, kw_only=True)
class Softmax(LogitRouterSpec):
    """All experts, blended by a learned softmax."""

    def choose(self, logits: Tensor, context: RoutingContext, *, training: bool) -> Routing:
        """Return dense weights."""
        return Routing(logits.softmax(-1), logits.shape[-1])
