"""Uncertainty weighting: a learned variance a task, `L = sum_t e^(-s_t) L_t + s_t / 2` with `s_t = log sigma_t^2`.

Kendall et al., "Multi-Task Learning Using Uncertainty to Weigh Losses for Scene Geometry and Semantics", section 3.2,
in the form for classification. Here the sum runs over tokens: each counts `e^(-s) l + s / 2` by the variance of its
task, so that a task's variance does not depend on how many tokens it has. At the best variance `e^(-s) = 1 / (2 L)`:
every task's weighted loss is 1/2.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from moadapt.balancing.balance import Balance, Balancer, check_at_least
from moadapt.registry import BALANCES


@BALANCES.register("uncertainty")
@dataclass(frozen=True, kw_only=True)
class Uncertainty(Balance):
    """Weights by a variance of each task's losses that is learned along (Kendall et al.).

    Args:
        learning_rate: Peak rate of the logarithms of the variances, which move by about it in a step.

    Raises:
        ValueError: The rate is not above 0.
    """

    learning_rate: float = 1e-2

    def __post_init__(self) -> None:
        """Check the range."""
        check_at_least(self, "learning_rate", 0, open_=True)

    def build(self, tasks: Sequence[str], seed: int) -> "UncertaintyBalancer":
        """Return what learns the variances."""
        return UncertaintyBalancer(tasks, self.learning_rate)


class UncertaintyBalancer(Balancer):
    """Learns the logarithm of each task's variance, from 0 on.

    Args:
        tasks: Names of the tasks.
        learning_rate: Peak rate.
    """

    def __init__(self, tasks: Sequence[str], learning_rate: float) -> None:
        super().__init__(tasks, learning_rate)
        self.log_variances = nn.Parameter(torch.zeros(len(tasks), dtype=torch.float64))

    def weights(self) -> Tensor:
        """Return the inverse variances, (S,)."""
        return torch.exp(-self.log_variances)

    def offsets(self) -> Tensor:
        """Return the logarithms of the standard deviations, (S,)."""
        return self.log_variances / 2
