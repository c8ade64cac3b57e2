"""Loaders whose place in the data is one number, and that share a batch among processes themselves.

They are no torch DataLoader, so that Lightning does not replace their samplers.
"""

import atexit
import logging
import signal
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import accumulate
from typing import Any
from weakref import WeakSet

from torch.utils.data import DataLoader, Dataset

from moadapt.stop_signals import STOP_SIGNALS
from moadapt.task import Defect, Example
from moadapt.training.batch import Batch
from moadapt.training.classes import ClassCollator
from moadapt.training.collate import Collator, Item
from moadapt.training.order import Draw, MixedOrder, spread

_LOG = logging.getLogger(__name__)


class Rows(Dataset[Item]):
    """The rows of one split, one task after the other, each read when it is drawn.

    Args:
        tasks: Rows of each task, by name.
        skip: Whether to leave out rows that turn out to be unusable when they are read; else they are an error.
    """

    def __init__(self, tasks: Mapping[str, Sequence[Example]], *, skip: bool = False) -> None:
        self.names, self.tasks, self.skip = list(tasks), list(tasks.values()), skip
        self.sizes = [len(examples) for examples in self.tasks]
        self._ends = list(accumulate(self.sizes))

    def __len__(self) -> int:
        """Rows of all tasks."""
        return self._ends[-1]

    def __getitem__(self, draw: Draw) -> Item:
        """Return the row that a draw names.

        Raises:
            Defect: It is read only now, and cannot be used.
        """
        task = bisect_right(self._ends, draw.row)
        start = self._ends[task] - self.sizes[task]
        return Item(self.names[task], self.tasks[task][draw.row - start], draw.row, draw.turn)

    def __getitems__(self, draws: Iterable[Draw]) -> list[Item]:
        """Return the rows of a batch.

        Raises:
            ValueError: One cannot be used, and is not to be skipped.
        """
        items = []
        for draw in draws:
            try:
                items.append(self[draw])
            except Defect as defect:
                if not self.skip:
                    raise ValueError(f"{defect}; mend it, or give on_bad_example: skip") from defect
                _LOG.warning("skipped: %s", defect)
        return items


class TrainLoader:
    """Training batches from wherever training stands.

    Args:
        rows: The training rows.
        order: Which rows each step takes.
        collator: Makes batches.
        num_workers: Processes that prepare batches ahead; 0 prepares them in this one.
        process: Index of this process.
        num_processes: How many processes share a batch, evenly.

    Raises:
        ValueError: The batch cannot be shared evenly.
    """

    def __init__(
        self,
        rows: Rows,
        order: MixedOrder,
        collator: Collator | ClassCollator,
        num_workers: int,
        process: int,
        num_processes: int,
    ) -> None:
        if order.batch_size % num_processes:
            raise ValueError(
                f"batch_size is {order.batch_size}, the rows of a step over all processes, and there are "
                f"{num_processes} processes; give a multiple of {num_processes}"
            )
        self.rows, self.order, self.collator, self.num_workers = rows, order, collator, num_workers
        share = order.batch_size // num_processes
        self._shares = [slice(each * share, (each + 1) * share) for each in range(num_processes)]
        self._own = self._shares[process]
        self.steps_done = 0

    def __len__(self) -> int:
        """Steps of an epoch."""
        return self.order.steps

    def __iter__(self) -> Iterator[Batch]:
        """Give the rest of the epoch that training is in.

        Nothing is read before the first batch is asked for: Lightning makes the iterator before it restores state.
        """
        epoch, step = divmod(self.steps_done, len(self))
        steps = (self.order.batch(epoch, rest)[self._own] for rest in range(step, len(self)))
        for batch in _batches(self.rows, steps, self.collator, self.num_workers):
            if not len(batch):
                raise ValueError(f"no row of step {self.steps_done} can be used; mend the data or give larger batches")
            batch.step = self.steps_done
            self.steps_done += 1
            yield batch

    def first(self, count: int) -> Iterator[Batch]:
        """Give the batches of the first steps, the shares of all processes one after the other.

        They are made in this process and without a torch DataLoader, which would draw from the global random state.

        Args:
            count: How many steps.
        """
        for step in range(count):
            draws = self.order.batch(*divmod(step, len(self)))
            for share in self._shares:
                yield self.collator(self.rows.__getitems__(draws[share]))

    def state_dict(self) -> dict[str, int]:
        """Return seed, epoch and step of the next batch."""
        epoch, step = divmod(self.steps_done, len(self))
        return {"seed": self.order.seed, "epoch": epoch, "step": step, "steps_per_epoch": len(self)}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on where `state_dict` was taken.

        Raises:
            ValueError: The data, its order or the batch size are not what they were.
        """
        own = {"seed": self.order.seed, "steps_per_epoch": len(self)}
        changed = [f"{name} was {state[name]} and is {now}" for name, now in own.items() if state[name] != now]
        if changed:
            raise ValueError(
                f"the checkpoint was written with other training data: {', '.join(changed)}; go on with the same "
                "tasks, batch_size and seed, or start a new run"
            )
        self.steps_done = state["epoch"] * len(self) + state["step"]


class EvaluationLoader:
    """Every row once, in batches of one task each, the tasks taking turns; all processes get equally many batches.

    A process for which no row is left gets the first one of the others, marked as spare: where a base is sharded, all
    of them must run it.

    Args:
        rows: The split's rows.
        collator: Makes batches.
        batch_size: Rows of a batch on one process.
        num_workers: As in `TrainLoader`.
        process: Index of this process.
        num_processes: How many processes share the rows.
    """

    def __init__(
        self,
        rows: Rows,
        collator: Collator | ClassCollator,
        batch_size: int,
        num_workers: int,
        process: int,
        num_processes: int,
    ) -> None:
        self.rows, self.collator, self.batch_size, self.num_workers = rows, collator, batch_size, num_workers
        self.process, self.num_processes = process, num_processes
        self._chunks = [-(-size // (batch_size * num_processes)) for size in rows.sizes]

    def __len__(self) -> int:
        """Batches on each process."""
        return sum(self._chunks)

    def __iter__(self) -> Iterator[Batch]:
        """Give all batches of this process."""
        rows = (self._own(number) or self._draws(number)[:1] for number in range(len(self)))
        for number, batch in enumerate(_batches(self.rows, rows, self.collator, self.num_workers)):
            batch.spare = not self._own(number)
            yield batch

    def _own(self, number: int) -> list[Draw]:
        """Return this process's rows of one batch."""
        return self._draws(number)[self.process :: self.num_processes]

    def _draws(self, number: int) -> list[Draw]:
        """Return the rows of all processes in one batch."""
        [(task, chunk)] = spread(self._chunks, [0.5] * len(self._chunks), number, number + 1)
        length = self.batch_size * self.num_processes
        start = sum(self.rows.sizes[:task])
        chunked = range(chunk * length, min((chunk + 1) * length, self.rows.sizes[task]))
        return [Draw(start + row, 0) for row in chunked]


def _batches(
    rows: Rows, batches: Iterable[list[Draw]], collator: Collator | ClassCollator, num_workers: int
) -> Iterator[Batch]:
    ignore = _ignore_signals if num_workers else None
    loader = DataLoader(
        rows, batch_sampler=batches, collate_fn=collator, num_workers=num_workers, worker_init_fn=ignore
    )
    iterator: Any = iter(loader)
    if not num_workers:
        yield from iterator
        return
    _OPEN.add(iterator)
    try:
        yield from iterator
    finally:  # the garbage collector may run in the very thread that is to tell the workers to end
        iterator._shutdown_workers()


_OPEN: "WeakSet[Any]" = WeakSet()


def _ignore_signals(worker: int) -> None:
    """Leave signals that reach the whole process group to the main process, which may need one more batch."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


@atexit.register
def _end_workers() -> None:
    """Ask workers to end; Python's own exit would terminate them by the signal that they ignore, and wait for ever."""
    for iterator in list(_OPEN):
        iterator._shutdown_workers()
