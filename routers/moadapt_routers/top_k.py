"""Sparse routing: the k experts of highest logit, weighted by a softmax over just those.

Shazeer et al., "Outrageously Large Neural Networks", section 2.1; `noise` makes it their noisy top-k gating, with a
spread that is given instead of learned. Logits start small and random, so that no two experts tie for every input.
"""

from dataclasses import dataclass

from torch import Tensor

from moadapt.registry import ROUTERS
from moadapt.router import RoutingContext
from moadapt.routing import Routing
from moadapt_routers.logit_router import LogitRouterSpec


@ROUTERS.register("top_k")
@dataclass(frozen=True, kw_only=True)
class TopK(LogitRouterSpec):
    """The k best experts of each input, blended by a softmax over them.

    Args:
        k: How many experts an input gets, 1 to E. With 1 the weight is always 1 and the router gets no gradient from
            the task, but from objectives alone.

    Raises:
        ValueError: k is below 1, or above the number of experts (at build).
    """

    k: int = 2

    def __post_init__(self) -> None:
        """Check the range."""
        super().__post_init__()
        if self.k < 1:
            raise ValueError(f"{type(self).__name__} got k={self.k}; it must be at least 1")

    @property
    def taught_by_loss(self) -> bool:
        """Whether there is more than one expert to weigh."""
        return self.k > 1

    def fewest(self) -> int:
        """Return k."""
        return self.k

    def choose(self, logits: Tensor, context: RoutingContext, *, training: bool) -> Routing:
        """Return sparse weights, (B, 1|T, 1, K), with their indices."""
        return best_of(logits, self.k)


def best_of(logits: Tensor, k: int) -> Routing:
    """Choose the k experts of highest logit, weighted by a softmax over them.

    Args:
        logits: (B, 1|T, 1, E).
        k: K.
    """
    best, indices = logits.topk(k, dim=-1)
    return Routing(best.softmax(-1), logits.shape[-1], indices)
