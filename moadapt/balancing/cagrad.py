"""CAGrad: of all steps near the mean gradient, the one that helps the worst-off task most.

The step `d` maximises `min_i g_i . d` under `|d - g_0| <= c |g_0|`, with `g_0` the mean of the gradients. Its dual is a
minimum over shares `w` of the tasks, `g_w . g_0 + c |g_0| |g_w|` with `g_w = sum_i w_i g_i`, and `d = g_0 + c |g_0| g_w
/ |g_w|`. Liu et al., "Conflict-Averse Gradient Descent for Multi-task Learning", section 3.1. Inner products suffice
here too. The step is taken times the number of tasks in it and over `1 + c`, so that it is the plain sum of the
gradients where `c` is 0 or they all agree.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from scipy.optimize import minimize
from torch import Tensor

from moadapt.balancing.balance import Balance, Balancer
from moadapt.registry import BALANCES

SHORTEST = 1e-4
"""A mixture of gradients shorter than this, over the longest of them, is taken as this long: its direction is noise."""


@BALANCES.register("cagrad")
@dataclass(frozen=True, kw_only=True)
class CAGrad(Balance):
    """Takes the step near the mean gradient that helps the worst-off task most, on the shared adapter.

    Args:
        c: How far from the mean gradient the step may be, as a share of its norm: from 0, where it is the mean, to
            below 1, beyond which the losses need not fall.

    Raises:
        ValueError: The share is out of range.
    """

    c: float = 0.4

    reads_gradients: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Check the range."""
        if not 0 <= self.c < 1:
            raise ValueError(f"CAGrad got c={self.c}; give 0 or more and below 1")

    def build(self, tasks: Sequence[str], seed: int) -> "ConflictAverse":
        """Return what finds the step."""
        return ConflictAverse(tasks, self.c)


class ConflictAverse(Balancer):
    """Finds the step of every set of gradients.

    Args:
        tasks: Names of the tasks.
        c: As in `CAGrad`.
    """

    def __init__(self, tasks: Sequence[str], c: float) -> None:
        super().__init__(tasks)
        self.c = c

    def combine(self, products: Tensor, step: int) -> Tensor:
        """Return the step as a weighted sum of the gradients, (S,)."""
        there = products.diagonal() > 0
        found = torch.zeros(len(products), dtype=products.dtype)
        if there.any():
            found[there] = averse(products[there][:, there], self.c)
        return found


def averse(products: Tensor, c: float) -> Tensor:
    """Return the step times the number of tasks, as a weighted sum of their gradients, (S,).

    Args:
        products: Inner products of the gradients, (S, S), with a diagonal above 0.
        c: As in `CAGrad`.
    """
    products = products / products.diagonal().max()
    count = len(products)
    mean = products.new_full((count,), 1 / count)
    reach = c * (mean @ products @ mean).clamp(min=0).sqrt()
    shares = worst_shares(products, mean, reach)
    length = (shares @ products @ shares).clamp(min=SHORTEST**2).sqrt()
    return count * (mean + reach * shares / length) / (1 + c)


def worst_shares(products: Tensor, mean: Tensor, reach: Tensor) -> Tensor:
    """Return the shares of the tasks at which the dual is least, (S,).

    Where the solver does not get there, the better of where it stopped and equal shares.

    Args:
        products: Inner products of the gradients, the largest being 1, (S, S).
        mean: Equal shares, (S,).
        reach: `c |g_0|`.
    """
    inner, pulls, far = products.numpy(), (products @ mean).numpy(), float(reach)

    def dual(shares: Any) -> tuple[float, Any]:
        across = inner @ shares
        length = max(float(shares @ across), SHORTEST**2) ** 0.5
        return float(shares @ pulls) + far * length, pulls + far * across / length

    found = minimize(
        dual,
        mean.numpy(),
        jac=True,
        method="SLSQP",
        bounds=[(0, 1)] * len(mean),
        constraints={"type": "eq", "fun": lambda shares: shares.sum() - 1, "jac": lambda shares: 0 * shares + 1},
        options={"ftol": 1e-12, "maxiter": 200},
    )
    shares = torch.from_numpy(found.x).clamp(min=0)
    shares = shares / shares.sum()
    if found.success or dual(shares.numpy())[0] < dual(mean.numpy())[0]:
        return shares
    return mean  # any shares give a step within reach; these give the plain sum
