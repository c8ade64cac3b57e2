"""Routing with constant weights, learned by reinforcement: no expert can crowd out the others.

ReMix (2025): training draws k experts without replacement from `q = softmax(l)`, all of them with one constant weight,
and runs the batch with several such draws. The router follows the leave-one-out policy gradient (RLOO)
`1/(M-1) sum_m (L_m - mean L) grad log Q_m`, with log Q the log-probability of the ordered draw; adapters follow the
mean loss. In use the k most probable experts act.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from moadapt.registry import ROUTERS
from moadapt.router import RoutingContext, Scope
from moadapt.routing import Routing
from moadapt_routers.top_k import TopK


@ROUTERS.register("remix")
@dataclass(frozen=True, kw_only=True)
class ReMix(TopK):
    """k experts of constant weight, drawn in training and the most probable ones in use.

    A training step costs the time and memory of as many passes as it has samples.

    Args:
        samples: How many draws a batch is run with, at least 2.
        weight: Of each chosen expert, above 0; None is 1/k, so that together they count as one.

    Raises:
        ValueError: There are too few samples, or the weight is not above 0.
    """

    samples: int = 2
    weight: float | None = None

    scopes: ClassVar[tuple[Scope, ...]] = ("sequence",)

    def __post_init__(self) -> None:
        """Check the ranges."""
        super().__post_init__()
        if self.samples < 2:
            raise ValueError(f"ReMix got samples={self.samples}; leaving one out takes at least 2")
        if self.weight is not None and not self.weight > 0:
            raise ValueError(f"ReMix got weight={self.weight}; it must be above 0, or None for 1/k")

    @property
    def passes(self) -> int:
        """How many draws a batch is run with."""
        return self.samples

    @property
    def taught_by_loss(self) -> bool:
        """True, whatever k: by its draws."""
        return True

    def policy_loss(self, log_prob: Tensor, losses: Tensor) -> Tensor:
        """Return what teaches the router, a scalar: its gradient is the leave-one-out policy gradient, over rows.

        Args:
            log_prob: Of each row's draws, over all places, (M, B).
            losses: Of each row, (M, B).
        """
        losses = losses.detach()
        advantages = (losses - losses.mean(dim=0)) / (len(losses) - 1)
        return (advantages * log_prob).sum()

    def choose(self, logits: Tensor, context: RoutingContext, *, training: bool) -> Routing:
        """Return constant weights, (B, 1, 1, K), and the draws' log-probability in training.

        Where fewer than k experts are available, the others drawn have weight 0 and no part in the log-probability.
        """
        keys = logits - torch.empty_like(logits).exponential_().log() if training else logits
        indices = keys.topk(self.k, dim=-1).indices  # with Gumbel noise: draws without replacement, in order
        available = ~logits.isneginf().gather(-1, indices)
        weights = available.to(logits.dtype) * (1 / self.k if self.weight is None else self.weight)
        log_prob = ordered_log_prob(logits, indices) if training else None
        return Routing(weights, logits.shape[-1], indices, log_prob=log_prob)


def ordered_log_prob(logits: Tensor, indices: Tensor) -> Tensor:
    """Return the log-probability of drawing these experts, one after the other, without replacement.

    Args:
        logits: (..., E); minus infinity where an expert cannot be drawn, which then adds nothing where it is named.
        indices: (..., K).

    Returns:
        (...).
    """
    drawn = torch.zeros_like(logits, dtype=torch.bool)
    terms = []
    for index in indices.unbind(-1):
        index = index.unsqueeze(-1)
        left = logits.masked_fill(drawn, torch.finfo(logits.dtype).min)  # finite, for when nothing is left to draw
        term = left.gather(-1, index) - left.logsumexp(-1, keepdim=True)
        terms.append(term.masked_fill(term.isneginf(), 0.0).squeeze(-1))
        drawn = drawn.scatter(-1, index, value=True)
    return torch.stack(terms).sum(dim=0)
