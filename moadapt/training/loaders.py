"""Loaders whose place in the data is a plain value, and that share a batch among processes themselves.

They are no torch DataLoader, so that Lightning does not replace their samplers.
"""

import atexit
import logging
import signal
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import accumulate
from typing import Any, TypeVar
from weakref import WeakSet

from torch.utils.data import DataLoader, Dataset

from moadapt.stop_signals import STOP_SIGNALS
from moadapt.task import Defect, Example
from moadapt.training.batch import Batch
from moadapt.training.classes import ClassCollator
from moadapt.training.collate import Collator, Item
from moadapt.training.order import Draw, MixedOrder, Place

Made = TypeVar("Made")
_LOG = logging.getLogger(__name__)


class Rows(Dataset[Item]):
    """The rows of one split, one task after the other, each read when it is drawn.

    Args:
        tasks: Rows of each task, by name.
        skip: Whether to leave out rows that turn out to be unusable when they are read; else they are an error.
    """

    def __init__(self, tasks: Mapping[str, Sequence[Example]], *, skip: bool = False) -> None:
        self.names, self.tasks, self.skip = list(tasks), list(tasks.values()), skip
        self.sizes = {name: len(examples) for name, examples in tasks.items()}
        self._ends = list(accumulate(self.sizes.values()))

    def __len__(self) -> int:
        """Rows of all tasks."""
        return self._ends[-1]

    def __getitem__(self, draw: Draw) -> Item:
        """Return the row that a draw names.

        Raises:
            Defect: It is read only now, and cannot be used.
        """
        task = bisect_right(self._ends, draw.row)
        start = self._ends[task] - len(self.tasks[task])
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
        num_processes: How many processes share a batch; their numbers of rows differ by one at most, and with a budget
            of tokens not at all.
        limit: Steps of one pass; None takes an epoch. The next pass goes on in the data where it ended.

    Raises:
        ValueError: A process would get no row, or, with a budget, more than its part of the tokens.
    """

    def __init__(
        self,
        rows: Rows,
        order: MixedOrder,
        collator: Collator | ClassCollator,
        num_workers: int,
        process: int,
        num_processes: int,
        limit: int | None = None,
    ) -> None:
        if order.batch_size < num_processes:
            raise ValueError(
                f"batch_size is {order.batch_size}, the rows of a step over all processes, and there are "
                f"{num_processes} processes; give at least one row a process"
            )
        if order.budget is not None and order.budget.multiple % num_processes:
            raise ValueError(
                f"batch_multiple is {order.budget.multiple} and there are {num_processes} processes, which could not "
                f"all keep to their part of batch_tokens; give a multiple of {num_processes}"
            )
        self.rows, self.order, self.collator, self.num_workers = rows, order, collator, num_workers
        self.process, self.num_processes = process, num_processes
        self.limit, self.place = limit, order.start

    @property
    def steps_done(self) -> int:
        """How many batches were given, in all epochs."""
        return self.place.step

    def __len__(self) -> int:
        """Steps of an epoch."""
        return self.order.steps

    def __iter__(self) -> Iterator[Batch]:
        """Give the rest of the pass that training is in.

        Nothing is read before the first batch is asked for: Lightning makes the iterator before it restores state.
        """
        steps = len(self) if self.limit is None else self.limit
        end = (self.steps_done // steps + 1) * steps
        while self.steps_done < end:
            yield from self._until(end)

    def follow(self, found: Mapping[str, float]) -> None:
        """Let the sampler know what a validation found; the next batch follows it, whatever workers have prepared.

        Args:
            found: What the sampler reads, by task; the same on all processes.
        """
        self.place = replace(self.place, known=self.order.sampler.follow(self.place.known, found))

    def first(self, count: int) -> Iterator[Batch]:
        """Give the batches of the first steps, the shares of all processes one after the other.

        They are made in this process and without a torch DataLoader, which would draw from the global random state.

        Args:
            count: How many steps.
        """
        place = self.order.start
        for _ in range(count):
            draws, place = self.order.batch(place)
            for process in range(self.num_processes):
                batch = self.collator(self.rows.__getitems__(self._share(draws, process)))
                if len(batch):
                    yield batch

    def state_dict(self) -> dict[str, Any]:
        """Return seed, epoch and step of the next batch, and what its rows depend on besides, in plain values."""
        return self.order.state(self.place)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken, on any number of processes.

        Raises:
            ValueError: The data, its order or the batch size are not what they were.
        """
        self.place = self.order.place(state)

    def _until(self, end: int) -> Iterator[Batch]:
        """Give batches up to a step, or until something else moves the place."""
        ahead: deque[Place] = deque()
        for batch in prepared(self.rows, self._planned(end, ahead), self.collator, self.num_workers):
            if not len(batch):
                batch = self._spare()
            batch.step = self.steps_done
            here = self.place = ahead.popleft()
            yield batch
            if self.place is not here:  # what was prepared ahead was drawn with the shares of before
                return

    def _spare(self) -> Batch:
        """Give a row of the others for the step under way, of which no row of this process can be used.

        Raises:
            ValueError: None of the others' can be used either, which all processes find alike.
        """
        batch = spare_batch(self.rows, self.order.batch(self.place)[0], self.collator)
        if not len(batch):
            raise ValueError(f"no row of step {self.steps_done} can be used; mend the data or give larger batches")
        return batch

    def _planned(self, end: int, ahead: "deque[Place]") -> Iterator[list[Draw]]:
        """Give this process's rows of every step; `ahead` gets the places behind those that were not given yet."""
        place = self.place
        while place.step < end:
            draws, place = self.order.batch(place)
            ahead.append(place)
            yield self._share(draws, self.process)

    def _share(self, draws: list[Draw], process: int) -> list[Draw]:
        start, stop = (len(draws) * edge // self.num_processes for edge in (process, process + 1))
        return draws[start:stop]


class EvaluationLoader:
    """Every row once, in batches of one task each, the tasks taking turns; all processes get equally many batches.

    A process for which no row is left, or none that can be used, gets one of the others, marked as spare: where a base
    is sharded, all of them must run it.

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
        counts = [-(-size // (batch_size * num_processes)) for size in rows.sizes.values()]
        turns = [((chunk + 0.5) / count, task, chunk) for task, count in enumerate(counts) for chunk in range(count)]
        self._chunks = [(task, chunk) for _, task, chunk in sorted(turns)]

    def __len__(self) -> int:
        """Batches on each process."""
        return len(self._chunks)

    def __iter__(self) -> Iterator[Batch]:
        """Give all batches of this process."""
        rows = (self._own(number) or self._draws(number)[:1] for number in range(len(self)))
        for number, batch in enumerate(prepared(self.rows, rows, self.collator, self.num_workers)):
            batch.spare = not self._own(number)
            yield batch if len(batch) else spare_batch(self.rows, self._draws(number), self.collator)

    def _own(self, number: int) -> list[Draw]:
        """Return this process's rows of one batch."""
        return self._draws(number)[self.process :: self.num_processes]

    def _draws(self, number: int) -> list[Draw]:
        """Return the rows of all processes in one batch."""
        task, chunk = self._chunks[number]
        length, sizes = self.batch_size * self.num_processes, list(self.rows.sizes.values())
        start = sum(sizes[:task])
        chunked = range(chunk * length, min((chunk + 1) * length, sizes[task]))
        return [Draw(start + row, 0) for row in chunked]


def spare_batch(rows: Rows, draws: Sequence[Draw], collator: Collator | ClassCollator) -> Batch:
    """Return the first row that can be used, as a batch that counts nowhere; where there is none, no row.

    Args:
        rows: Where they are read, those that cannot be used being skipped.
        draws: The rows of all processes.
        collator: Makes the batch.
    """
    batch = collator(next(filter(None, (rows.__getitems__([draw]) for draw in draws)), []))
    batch.spare = True
    return batch


def prepared(
    rows: Rows, batches: Iterable[list[Draw]], collate: Callable[[list[Item]], Made], num_workers: int
) -> Iterator[Made]:
    """Read rows and give what is made of them, in order.

    Args:
        rows: Where they are read.
        batches: Which rows are read together; asked for ahead where there are workers.
        collate: Makes something of those that can be used.
        num_workers: Processes that do so ahead; 0 does it in this one.

    Raises:
        ValueError: A row cannot be used, and is not to be skipped.
    """
    ignore = _ignore_signals if num_workers else None
    loader = DataLoader(rows, batch_sampler=batches, collate_fn=collate, num_workers=num_workers, worker_init_fn=ignore)
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
