"""GradNorm: weights under which the gradients of all tasks are about equally large, and larger for slow tasks.

`G_t = |w_t grad L_t|` on the shared parameters, `r_t = (L_t / L_t(0)) / mean`, and the weights go down the gradient of
`sum_t |G_t - mean(G) r_t^alpha|`, the targets being constants. Chen et al., "GradNorm: Gradient Normalization for
Adaptive Loss Balancing in Deep Multitask Networks", section 3. As in the paper the mean weight stays 1. Here the
distance is that of logarithms, and so is the descent: a weight that is too large goes down by the share
`learning_rate`, one that is too small goes up by it, however large losses and gradients are. And as the loss is a mean
over tokens, a task's gradient is large for having many tokens too, which is evened out with the rest. Tasks are
compared where a step has at least two of them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from moadapt.balancing.balance import Balance, Balancer, check_at_least
from moadapt.registry import BALANCES

LEAST, MOST = 0.01, 100.0
"""Bounds of a weight: beyond them a task would be trained by next to nothing, or alone."""


@BALANCES.register("gradnorm")
@dataclass(frozen=True, kw_only=True)
class GradNorm(Balance):
    """Weights that make the gradients of all tasks equally large, those of slow tasks larger (Chen et al.).

    Args:
        alpha: How strongly slow tasks are pulled, 0 or more; 0 makes all norms equal.
        learning_rate: Share by which a weight moves in a step, above 0.

    Raises:
        ValueError: A setting is out of range.
    """

    alpha: float = 1.5
    learning_rate: float = 0.025

    reads_gradients: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Check ranges."""
        check_at_least(self, "alpha", 0)
        check_at_least(self, "learning_rate", 0, open_=True)

    def build(self, tasks: Sequence[str], seed: int) -> "GradNormBalancer":
        """Return what moves the weights."""
        return GradNormBalancer(tasks, self)


class GradNormBalancer(Balancer):
    """Moves weights by the norms of gradients.

    Args:
        tasks: Names of the tasks.
        settings: What the user chose.
    """

    current: Tensor
    first: Tensor

    def __init__(self, tasks: Sequence[str], settings: GradNorm) -> None:
        super().__init__(tasks)
        self.settings = settings
        self.register_buffer("current", torch.ones(len(tasks), dtype=torch.float64))
        self.register_buffer("first", torch.zeros(len(tasks), dtype=torch.float64))  # 0 where none was seen

    def weights(self) -> Tensor:
        """Return the weights, (S,), whose mean is 1."""
        return self.current

    def follow(self, losses: Tensor, counts: Tensor, products: Tensor | None) -> None:
        """Move the weights of the next step, and keep the losses of each task's first."""
        assert products is not None, "it reads gradients"
        means = losses / counts.clamp(min=1)
        self.first = torch.where((self.first == 0) & (counts > 0), means, self.first)
        norms = products.to(means).diagonal().clamp(min=0).sqrt()
        there = (norms > 0) & (counts > 0) & (self.first > 0)
        if int(there.sum()) > 1:
            moved = moved_weights(self.current[there], norms[there], (means / self.first)[there], self.settings)
            moved = bounded(moved, float(self.current[there].sum()))  # tasks that are not there keep theirs
            self.current = self.current.masked_scatter(there, moved)


def bounded(weights: Tensor, total: float) -> Tensor:
    """Return weights times one factor, kept from `LEAST` to `MOST`, that add up to a total, (S,).

    Args:
        weights: (S,), above 0.
        total: From S `LEAST` to S `MOST`.
    """
    low, high = LEAST / float(weights.max()), MOST / float(weights.min())
    for _ in range(100):  # halving, as the sum grows with the factor
        factor = (low + high) / 2
        low, high = (factor, high) if float((weights * factor).clamp(LEAST, MOST).sum()) < total else (low, factor)
    return (weights * high).clamp(LEAST, MOST)


def moved_weights(weights: Tensor, norms: Tensor, progress: Tensor, settings: GradNorm) -> Tensor:
    """Return the weights of some tasks after one step down GradNorm's loss.

    Args:
        weights: (S,), above 0.
        norms: Of the weighted gradients, (S,), above 0.
        progress: Each task's loss over its first loss, (S,).
        settings: What the user chose.
    """
    mean = norms.mean()
    targets = mean * (progress / progress.mean()) ** settings.alpha
    return weights * torch.exp(-settings.learning_rate * torch.sign(norms - targets))
