"""Dynamic weight averaging: tasks whose loss falls slowly get more weight.

`w_t = S softmax(r_t / temperature)` with `r_t = L_t(k) / L_t(k - 1)`, the task's mean loss over the last stretch of
steps over that of the stretch before. Liu et al., "End-to-End Multi-Task Learning with Attention", section 3.3, where
a stretch is an epoch; here it is a number of steps. A task without a row in a stretch keeps its last ratio. Weights
are 1 until two stretches are over.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moadapt.balancing.balance import Balance, Balancer, check_at_least
from moadapt.registry import BALANCES


@BALANCES.register("dynamic_average")
@dataclass(frozen=True, kw_only=True)
class DynamicAverage(Balance):
    """Weights by how slowly each task's loss falls (dynamic weight averaging).

    Args:
        every: Steps in a stretch, 1 or more.
        temperature: How alike weights are, above 0.

    Raises:
        ValueError: A setting is out of range.
    """

    every: int = 100
    temperature: float = 2.0

    def __post_init__(self) -> None:
        """Check ranges."""
        check_at_least(self, "every", 1)
        check_at_least(self, "temperature", 0, open_=True)

    def build(self, tasks: Sequence[str], seed: int) -> "DynamicAverager":
        """Return what follows the losses."""
        return DynamicAverager(tasks, self)


class DynamicAverager(Balancer):
    """Follows the mean losses of stretches of steps.

    Args:
        tasks: Names of the tasks.
        settings: What the user chose.
    """

    steps: Tensor
    sums: Tensor
    before: Tensor
    ratios: Tensor

    def __init__(self, tasks: Sequence[str], settings: DynamicAverage) -> None:
        super().__init__(tasks)
        self.settings = settings
        self.register_buffer("steps", torch.tensor(0))
        self.register_buffer("sums", torch.zeros(2, len(tasks), dtype=torch.float64))
        self.register_buffer("before", torch.zeros(len(tasks), dtype=torch.float64))  # 0 where no stretch is over
        self.register_buffer("ratios", torch.ones(len(tasks), dtype=torch.float64))

    def weights(self) -> Tensor:
        """Return the weights of this stretch, (S,), whose mean is 1."""
        return len(self.tasks) * torch.softmax(self.ratios / self.settings.temperature, dim=0)

    def follow(self, losses: Tensor, counts: Tensor, products: Tensor | None) -> None:
        """Add a step to the stretch; at its end compare it with the one before."""
        self.sums += torch.stack([losses, counts]).to(self.sums)
        self.steps += 1
        if int(self.steps) % self.settings.every:
            return
        seen, means = self.sums[1] > 0, self.sums[0] / self.sums[1].clamp(min=1)
        comparable = seen & (self.before > 0)
        self.ratios = torch.where(comparable, means / self.before.where(comparable, means), self.ratios)
        self.before = torch.where(seen, means, self.before)
        self.sums = torch.zeros_like(self.sums)
