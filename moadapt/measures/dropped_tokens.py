"""Dropped tokens: choices that were worth nothing, as where an expert has no room left."""

import torch
from torch import Tensor
from torchmetrics import Metric

from moadapt.routed import Routed


class DroppedTokens(Metric):
    """The share of an input's chosen experts that got weight 0, from 0 to 1; a dense routing chooses none in vain."""

    dropped: Tensor
    chosen: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("dropped", torch.tensor(0.0), dist_reduce_fx="sum")
        self.add_state("chosen", torch.tensor(0.0), dist_reduce_fx="sum")

    def update(self, routed: Routed) -> None:
        """Count choices.

        Args:
            routed: The inputs that one place routed.
        """
        self.dropped += routed.total((routed.chosen & (routed.weights == 0)).sum(-1).to(routed.weights))
        self.chosen += routed.total(routed.chosen.sum(-1).to(routed.weights))

    def compute(self) -> Tensor:
        """Return the share; not a number where nothing was chosen."""
        return self.dropped / self.chosen
