"""PCGrad: each task's gradient loses what opposes the gradient of another task.

Going through the other tasks in random order, `g_i <- g_i - (g_i . g_j / |g_j|^2) g_j` wherever `g_i . g_j < 0`, `g_j`
being as it was at first; then the gradients are added. Yu et al., "Gradient Surgery for Multi-Task Learning", algorithm
1. As every result is a weighted sum of the gradients at first, their inner products suffice.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from moadapt.balancing.balance import Balance, Balancer
from moadapt.registry import BALANCES


@BALANCES.register("pcgrad")
@dataclass(frozen=True, kw_only=True)
class PCGrad(Balance):
    """Projects each task's gradient off those that it opposes, on the shared adapter (gradient surgery)."""

    reads_gradients: ClassVar[bool] = True

    def build(self, tasks: Sequence[str], seed: int) -> "Projector":
        """Return what projects."""
        return Projector(tasks, seed)


class Projector(Balancer):
    """Projects gradients in an order that is drawn anew in every step.

    Args:
        tasks: Names of the tasks.
        seed: Of the orders.
    """

    def __init__(self, tasks: Sequence[str], seed: int) -> None:
        super().__init__(tasks)
        self.seed = seed

    def combine(self, products: Tensor, step: int) -> Tensor:
        """Return the sum of what is left of every gradient, (S,)."""
        generator = torch.Generator().manual_seed((self.seed << 32) + step)
        orders = [torch.randperm(len(products), generator=generator).tolist() for _ in self.tasks]
        return projected(products, orders).sum(dim=0)


def projected(products: Tensor, orders: Sequence[Sequence[int]]) -> Tensor:
    """Return what is left of every gradient, as a weighted sum of all of them, (S, S).

    Args:
        products: Inner products of the gradients, (S, S).
        orders: For each task the order in which the others are looked at.
    """
    left = torch.eye(len(products), dtype=products.dtype)
    for own, order in enumerate(orders):
        for other in order:
            against = left[own] @ products[:, other]
            if other != own and against < 0 < products[other, other]:
                left[own, other] -= against / products[other, other]
    return left
