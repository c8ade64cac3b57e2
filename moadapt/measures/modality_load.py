"""Load by modality: which experts text tokens and image tokens get."""

import torch
from torch import Tensor
from torchmetrics import Metric

from moadapt.routed import Routed


class ModalityLoad(Metric):
    """The share of each expert in what was routed of text tokens and of image tokens, (2, E), rows summing to 1.

    Args:
        num_experts: E.
    """

    given: Tensor

    def __init__(self, num_experts: int) -> None:
        super().__init__()
        self.add_state("given", torch.zeros(2, num_experts), dist_reduce_fx="sum")

    def update(self, routed: Routed) -> None:
        """Count tokens, where text and image tokens are routed apart.

        Args:
            routed: The inputs that one place routed.
        """
        if routed.images is not None:
            images = routed.images.unsqueeze(1).to(routed.shares.dtype)
            self.given[0] += routed.total(routed.shares * (1 - images))
            self.given[1] += routed.total(routed.shares * images)

    def compute(self) -> Tensor:
        """Return the shares; not a number in the row of a modality of which nothing was routed."""
        return self.given / self.given.sum(-1, keepdim=True)
