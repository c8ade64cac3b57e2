"""What fitted routers share that score every expert and take the best: how many, how sharply, and among which.

Axes: B rows, T tokens, E experts, K chosen.
"""

from abc import abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from moadapt.router import Router, RouterSpec, mask_unavailable
from moadapt.routing import Routing


@dataclass(frozen=True, kw_only=True)
class RetrievalSpec(RouterSpec):
    """The k experts of highest score, weighted by a softmax over them.

    Args:
        k: How many experts an input gets, at least 1.
        temperature: Divides the scores, above 0; lower is sharper.

    Raises:
        ValueError: k or the temperature is out of range.
    """

    k: int = 2
    temperature: float = 1.0

    def __post_init__(self) -> None:
        """Check the ranges."""
        super().__post_init__()
        if self.k < 1 or not self.temperature > 0:
            raise ValueError(
                f"{type(self).__name__} got k={self.k}, temperature={self.temperature}; k is at least 1, the "
                "temperature above 0"
            )

    @abstractmethod
    def router(self, dim: int, num_experts: int) -> Router:
        """Build the router of one place, of k experts or more.

        Args:
            dim: D.
            num_experts: E.
        """

    def build(self, dim: int, num_experts: int) -> Router:
        """Build the router of one place.

        Raises:
            ValueError: There are fewer than k experts.
        """
        self.check_count(num_experts)
        return self.router(dim, num_experts)

    def check_count(self, num_experts: int) -> None:
        """Refuse fewer experts than an input gets.

        Raises:
            ValueError: There are too few.
        """
        if num_experts < self.k:
            raise ValueError(
                f"{type(self).__name__} gives an input {self.k} experts, but there are {num_experts}; choose a smaller "
                "k, or give more"
            )

    def choose(self, scores: Tensor, present: Tensor | None) -> Routing:
        """Return sparse weights, (B, 1|T, 1, K), and all scores as logits.

        Args:
            scores: (B, 1|T, 1, E).
            present: Which experts may be chosen, (E,); where they are fewer than k, the other weights are 0.
        """
        logits = scores / self.temperature
        best, indices = mask_unavailable(logits, present).topk(self.k, dim=-1)
        chosen = best > float("-inf")
        weights = best.masked_fill(~chosen, torch.finfo(best.dtype).min).softmax(-1) * chosen
        return Routing(weights, logits.shape[-1], indices, logits=logits)
