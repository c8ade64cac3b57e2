"""The order of training rows: which rows the step s of epoch e trains on, as a pure function of the seed.

An epoch has `rows // batch_size` steps. Every task has a fixed share of it, and its rows are spread evenly over the
epoch, so that every batch mixes the tasks in their shares. A task goes through its own rows in shuffled passes that do
not stop at epochs: no row comes a second time before all others of its task came once.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Sampling = Literal["proportional", "uniform"] | float


@dataclass(frozen=True)
class Draw:
    """One row of a batch.

    Args:
        row: Index among the rows of all tasks, one task after the other.
        turn: How often this row was drawn before.
    """

    row: int
    turn: int


class MixedOrder:
    """Batches that mix tasks.

    Args:
        sizes: Rows of each task, each at least 1.
        batch_size: Rows of a step, over all processes, at least 1.
        sampling: Shares of the tasks: `proportional` to their sizes, `uniform`, or a temperature T of at least 1 for
            shares proportional to size^(1/T).
        seed: Another seed is another order, from 0.

    Raises:
        ValueError: A number is out of range, or a batch has fewer rows than there are tasks.
    """

    def __init__(self, sizes: Sequence[int], batch_size: int, sampling: Sampling, seed: int) -> None:
        if not sizes or min(sizes) < 1 or batch_size < len(sizes):
            raise ValueError(
                f"batch_size is {batch_size} and the tasks have {list(sizes)} rows; every task needs rows, and a batch "
                "needs at least one row a task"
            )
        self.sizes, self.batch_size, self.seed = tuple(sizes), batch_size, seed
        self.steps = max(1, sum(sizes) // batch_size)
        self.counts = _apportion(_shares(sizes, sampling), self.steps * batch_size)
        self._offsets = [sum(sizes[:task]) for task in range(len(sizes))]

    def batch(self, epoch: int, step: int) -> list[Draw]:
        """Return the rows of one step.

        Args:
            epoch: From 0.
            step: From 0 to `steps` - 1.
        """
        tasks, ranks = _spread(self.seed, self.counts, epoch)
        here = slice(step * self.batch_size, (step + 1) * self.batch_size)
        return [self._draw(epoch, int(t), int(j)) for t, j in zip(tasks[here], ranks[here], strict=True)]

    def _draw(self, epoch: int, task: int, rank: int) -> Draw:
        turn, place = divmod(epoch * self.counts[task] + rank, self.sizes[task])
        return Draw(self._offsets[task] + int(_shuffled(self.seed, task, turn, self.sizes[task])[place]), turn)


def _shares(sizes: Sequence[int], sampling: Sampling) -> NDArray[np.float64]:
    """Return the share of every task, summing to 1."""
    if isinstance(sampling, str) and sampling not in ("proportional", "uniform"):
        raise ValueError(f"sampling is {sampling!r}; give proportional, uniform or a temperature of at least 1")
    if not isinstance(sampling, str) and not sampling >= 1:
        raise ValueError(f"sampling is a temperature of {sampling}; give at least 1, which is proportional")
    power = {"proportional": 1.0, "uniform": 0.0}[sampling] if isinstance(sampling, str) else 1 / sampling
    weights = np.asarray(sizes, dtype=np.float64) ** power
    return np.asarray(weights / weights.sum())


def _apportion(shares: NDArray[np.float64], total: int) -> tuple[int, ...]:
    """Divide `total` rows by the shares, at least one each: whole parts first, then by largest remainder."""
    exact = np.maximum(shares * total, 1)
    exact *= total / exact.sum()
    counts = np.maximum(np.floor(exact), 1).astype(int)
    while counts.sum() > total and counts.max() > 1:  # many tiny tasks took one each
        counts[counts.argmax()] -= 1
    for task in np.argsort(counts - exact, kind="stable")[: max(0, total - counts.sum())]:
        counts[task] += 1
    return tuple(int(count) for count in counts)


@lru_cache(maxsize=4)
def _spread(seed: int, counts: tuple[int, ...], epoch: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return task and rank within the task of every place of an epoch, each task spread evenly over it."""
    offsets = np.random.default_rng([seed, 0, epoch]).random(len(counts))
    places = np.concatenate([(np.arange(c) + offset) / c for c, offset in zip(counts, offsets, strict=True)])
    tasks = np.repeat(np.arange(len(counts)), counts)
    ranks = np.concatenate([np.arange(count) for count in counts])
    order = np.argsort(places, kind="stable")
    return tasks[order], ranks[order]


@lru_cache(maxsize=256)
def _shuffled(seed: int, task: int, turn: int, size: int) -> NDArray[np.int64]:
    return np.random.default_rng([seed, 1, task, turn]).permutation(size)
