"""Sparsity: weights that nobody needs shall go to zero.

The L1 norm of an input's weights, in the mean, as the lasso (Tibshirani, "Regression Shrinkage and Selection via the
Lasso") puts it on coefficients. It is for gates that open and shut one by one; where the weights of an input add up to
one, as those of a softmax do, their norm is one and only their entropy can make them few.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from moadapt.objectives.objective import RoutingObjective
from moadapt.registry import OBJECTIVES
from moadapt.routed import Routed

if TYPE_CHECKING:
    from moadapt.mixture import Mixture


@OBJECTIVES.register("sparsity")
@dataclass(frozen=True, kw_only=True)
class Sparsity(RoutingObjective):
    """Shut gates: the mean L1 norm of an input's weights, for routers whose weights need not add up to one."""

    weight: float = 0.01

    def sums(self, routed: Routed) -> Tensor:
        """Return the sizes of the weights and the number of inputs, (2,)."""
        return torch.stack([routed.total(routed.weights.abs().sum(-1)), routed.count])

    def value(self, sums: Tensor, routed: Routed) -> Tensor:
        """Return the mean."""
        return sums[0] / sums[1].clamp(min=1)

    def check(self, mixture: "Mixture", tasks: Sequence[str]) -> None:
        """Refuse routers whose weights always add up to one."""
        super().check(mixture, tasks)
        router = mixture.spec.router
        if self.weight and router is not None and router.sums_to_one:
            raise ValueError(
                f"the weights of {type(router).__name__} add up to 1 for every input, so Sparsity cannot make them "
                "fewer; use the objective entropy with direction: sharpen"
            )
