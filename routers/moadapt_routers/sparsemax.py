"""Routing by sparsemax: the weights on the simplex nearest to the logits, of which some are exactly 0.

Martins and Astudillo, "From Softmax to Sparsemax", section 2: `p = max(z - tau, 0)`, with tau such that p sums to 1.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from moadapt.registry import ROUTERS
from moadapt.router import RoutingContext
from moadapt.routing import Routing
from moadapt_routers.logit_router import LogitRouterSpec


@ROUTERS.register("sparsemax")
@dataclass(frozen=True, kw_only=True)
class Sparsemax(LogitRouterSpec):
    """As many experts as an input needs: a learned blend in which weak experts get nothing.

    Once an expert has weight 0 for an input, that input teaches it and its logit nothing.
    """

    def choose(self, logits: Tensor, context: RoutingContext, *, training: bool) -> Routing:
        """Return dense weights, some of them 0."""
        return Routing(sparsemax(logits), logits.shape[-1])


def sparsemax(logits: Tensor) -> Tensor:
    """Return the point of the simplex nearest to logits.

    Args:
        logits: (..., E); minus infinity where an expert may have nothing.
    """
    ordered = logits.sort(dim=-1, descending=True).values
    sums = ordered.cumsum(-1)
    places = torch.arange(1, logits.shape[-1] + 1, device=logits.device)
    kept = (1 + places * ordered > sums).sum(-1, keepdim=True)
    threshold = (sums.gather(-1, kept - 1) - 1) / kept
    return (logits - threshold).clamp(min=0)
