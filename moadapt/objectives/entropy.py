"""Entropy of every input's own routing: few experts an input, or many.

With p the probabilities of an input, `H = -sum_e p_e log p_e` lies between 0, one expert alone, and ln E, all alike.
LoRA-Mixer (Li et al., "LoRA-Mixer: Coordinate Modular LoRA Experts Through Serial Attention Routing") sharpens token by
token while it balances the load; its formula as printed has the sign that flattens, so the two directions have names
here.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from moadapt.objectives.objective import RoutingObjective
from moadapt.registry import OBJECTIVES
from moadapt.routed import Routed

Direction = Literal["sharpen", "spread"]


@OBJECTIVES.register("entropy")
@dataclass(frozen=True, kw_only=True)
class Entropy(RoutingObjective):
    """Few experts for each input, or many, by the mean entropy of its probabilities.

    Args:
        weight: What the value is multiplied by before it joins the loss, 0 or more.
        direction: `sharpen` makes the entropy small; `spread` makes small what it lacks of ln E. Both go down to 0.

    Raises:
        ValueError: The direction is unknown.
    """

    direction: Direction = "sharpen"

    def __post_init__(self) -> None:
        """Check the direction."""
        super().__post_init__()
        if self.direction not in ("sharpen", "spread"):
            raise ValueError(f"Entropy got direction={self.direction!r}; choose sharpen or spread")

    def sums(self, routed: Routed) -> Tensor:
        """Return the entropies and the number of inputs, (2,)."""
        return torch.stack([routed.total(routed.entropy), routed.count])

    def value(self, sums: Tensor, routed: Routed) -> Tensor:
        """Return the mean entropy, or what it lacks of ln E."""
        mean = sums[0] / sums[1].clamp(min=1)
        return mean if self.direction == "sharpen" else math.log(routed.num_experts) - mean
