"""Fixed weights: the loss of a task's rows is multiplied by a number that somebody chose."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from moadapt.balancing.balance import Balance, Balancer
from moadapt.registry import BALANCES


@BALANCES.register("fixed")
@dataclass(frozen=True, kw_only=True)
class Fixed(Balance):
    """Weights that somebody chose, one a task.

    Args:
        weights: Weight by task, 0 or more; tasks that are not named get 1.

    Raises:
        ValueError: A weight is negative or no finite number.
    """

    weights: Mapping[str, float] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        """Check the range."""
        wrong = {name: weight for name, weight in self.weights.items() if not 0 <= weight < float("inf")}
        if wrong:
            raise ValueError(f"Fixed got weights {wrong}; give finite numbers of 0 or more")

    def build(self, tasks: Sequence[str], seed: int) -> "FixedBalancer":
        """Return what weighs the tasks."""
        unknown = sorted(set(self.weights) - set(tasks))
        if unknown:
            raise ValueError(f"balance weighs {', '.join(unknown)}, but the tasks are {', '.join(tasks)}")
        if not any(self.weights.get(name, 1.0) for name in tasks):
            raise ValueError(f"balance weighs {', '.join(tasks)} by 0, so nothing is trained; give one more than 0")
        return FixedBalancer(tasks, [self.weights.get(name, 1.0) for name in tasks])


class FixedBalancer(Balancer):
    """Gives each task its weight.

    Args:
        tasks: Names of the tasks.
        weights: One a task.
    """

    def __init__(self, tasks: Sequence[str], weights: Sequence[float]) -> None:
        super().__init__(tasks)
        self.register_buffer("given", torch.tensor(weights, dtype=torch.float64), persistent=False)

    def weights(self) -> Tensor:
        """Return them, (S,)."""
        return self.get_buffer("given")
