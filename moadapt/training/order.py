"""The order of training rows: which rows the step s of epoch e trains on, as a pure function of the seed.

An epoch has `rows // batch_size` steps. Every task has a fixed share of it, and its rows are spread evenly over the
epoch, so that every batch mixes the tasks in their shares. A task goes through its own rows in shuffled passes that do
not stop at epochs: no row comes a second time before all others of its task came once.
"""

from collections.abc import Sequence
from dataclasses import dataclass
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
        self._starts = [sum(sizes[:task]) for task in range(len(sizes))]
        self._passes: dict[int, tuple[int, NDArray[np.int64]]] = {}

    def batch(self, epoch: int, step: int) -> list[Draw]:
        """Return the rows of one step.

        Args:
            epoch: From 0.
            step: From 0 to `steps` - 1.
        """
        offsets = np.random.default_rng([self.seed, 0, epoch]).random(len(self.counts)).tolist()
        places = spread(self.counts, offsets, step * self.batch_size, (step + 1) * self.batch_size)
        return [self._draw(epoch, task, rank) for task, rank in places]

    def _draw(self, epoch: int, task: int, rank: int) -> Draw:
        turn, place = divmod(epoch * self.counts[task] + rank, self.sizes[task])
        return Draw(self._starts[task] + int(self._shuffled(task, turn)[place]), turn)

    def _shuffled(self, task: int, turn: int) -> NDArray[np.int64]:
        """Return the order of a pass through a task's rows; the last one asked for is kept."""
        if self._passes.get(task, (None,))[0] != turn:
            self._passes.pop(task, None)  # first, so that two are never held
            rng = np.random.default_rng([self.seed, 1, task, turn])
            self._passes[task] = turn, rng.permutation(self.sizes[task])
        return self._passes[task][1]


def spread(counts: Sequence[int], offsets: Sequence[float], start: int, stop: int) -> list[tuple[int, int]]:
    """Merge lists so that every stretch holds their elements in proportion, and return a stretch of the merged one.

    Element j of a list of n is placed at (j + offset) / n, so that between 0 and x there are n x of it, give or take
    one; only those that can fall into the stretch are looked at.

    Args:
        counts: Elements of each list, at least 1.
        offsets: For each list, from 0 to 1.
        start: Where the stretch begins.
        stop: Where it ends, at most the sum of `counts`.

    Returns:
        List and position in it, of every element of the stretch.
    """
    total, lists = sum(counts), len(counts)
    least, most = (start - lists - 1) / total, (stop + lists + 1) / total
    found, before = [], 0
    for each, (count, offset) in enumerate(zip(counts, offsets, strict=True)):
        first = min(max(int(least * count - offset) - 1, 0), count)
        last = min(int(most * count - offset) + 2, count)
        found += [((j + offset) / count, each, j) for j in range(first, last)]
        before += first
    return [(each, j) for _, each, j in sorted(found)[start - before : stop - before]]


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
