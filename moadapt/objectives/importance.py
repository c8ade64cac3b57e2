"""Importance: all experts shall get the same probability in sum.

Shazeer et al., "Outrageously Large Neural Networks", section 4: with `P_e` the sum over inputs of expert e's
probability, the squared coefficient of variation `Var(P) / Mean(P)^2 = E sum_e P_e^2 / (sum_e P_e)^2 - 1`. It is 0
where all are equal, and E - 1 where one gets everything. Unlike load balance it does not look at choices.
"""

from dataclasses import dataclass

from torch import Tensor

from moadapt.objectives.objective import RoutingObjective
from moadapt.registry import OBJECTIVES
from moadapt.routed import Routed


@OBJECTIVES.register("importance")
@dataclass(frozen=True, kw_only=True)
class Importance(RoutingObjective):
    """The same probability for all experts in sum: its squared coefficient of variation, from 0 to E - 1."""

    def sums(self, routed: Routed) -> Tensor:
        """Return the probabilities of each expert, (E,)."""
        return routed.total(routed.probabilities)

    def value(self, sums: Tensor, routed: Routed) -> Tensor:
        """Return the squared coefficient of variation."""
        return routed.num_experts * sums.square().sum() / sums.sum().square().clamp(min=1e-12) - 1
