"""The order of training rows: which rows the next step trains on, wherever training stands in the data.

A sampler gives each task a share, and tasks take turns so that every stretch of rows holds them in their shares. A task
goes through its own rows in shuffled passes that stop neither at epochs nor when shares change: no row comes a second
time before all others of its task came once. What a step takes is a function of the seed and of the place in the data,
a plain value that the step before hands on. How many processes train does not enter: they share the rows of a step.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moadapt.sampling import Known, Sampler


@dataclass(frozen=True)
class Draw:
    """One row of a batch.

    Args:
        row: Index among the rows of all tasks, one task after the other.
        turn: How often this row was drawn before.
    """

    row: int
    turn: int


@dataclass(frozen=True)
class Place:
    """Where training stands in the data.

    Args:
        step: How many batches were drawn.
        drawn: Rows of each task among them.
        waits: How long each task waits for its next turn, in rows of its own.
        known: What the sampler remembers of validations.
    """

    step: int
    drawn: tuple[int, ...]
    waits: tuple[float, ...]
    known: Known


@dataclass(frozen=True)
class Budget:
    """A limit to the tokens of a step, padding included: its rows times the length of the longest.

    Args:
        tokens: The limit, over all processes.
        multiple: What the number of rows is a multiple of, so that as many processes get equal parts.
        lengths: Tokens of every row, of all tasks one after the other, (N,).

    Raises:
        ValueError: The longest row does not fit in so often.
    """

    tokens: int
    multiple: int
    lengths: NDArray[np.int64]

    @property
    def told(self) -> dict[str, int]:
        """What tells it from others, in plain values."""
        return {"tokens": self.tokens, "multiple": self.multiple, "all_lengths": int(self.lengths.sum())}

    def __post_init__(self) -> None:
        """Require that a step may hold any rows."""
        longest = int(self.lengths.max())
        if longest * self.multiple > self.tokens:
            raise ValueError(
                f"batch_tokens is {self.tokens}, and {self.multiple} rows (batch_multiple) of the longest row's "
                f"{longest} tokens do not fit in; give at least {longest * self.multiple}, a smaller multiple, or "
                "leave long rows out"
            )


class MixedOrder:
    """Batches of rows of several tasks.

    Args:
        sizes: Rows of each task by name, each at least 1.
        batch_size: Rows of a step, over all processes, at least 1; with a budget the most of them.
        sampler: Gives the tasks their shares.
        seed: Another seed is another order, from 0.
        one_task: Whether each batch holds rows of one task, tasks taking turns batch by batch.
        budget: Limits the tokens of a step; None takes `batch_size` rows.

    Raises:
        ValueError: A number is out of range, or the sampler refuses the tasks.
    """

    def __init__(
        self,
        sizes: Mapping[str, int],
        batch_size: int,
        sampler: Sampler,
        seed: int,
        *,
        one_task: bool = False,
        budget: Budget | None = None,
    ) -> None:
        self.group = batch_size if budget is None else budget.multiple
        if not sizes or min(sizes.values()) < 1 or batch_size < self.group or batch_size < 1:
            raise ValueError(
                f"batch_size is {batch_size} and the tasks have {dict(sizes)} rows; every task needs a row, and a step "
                f"at least {max(1, self.group if budget else 1)}"
            )
        self.sizes, self.batch_size, self.sampler, self.seed = dict(sizes), batch_size, sampler, seed
        self.one_task, self.budget = one_task, budget
        self._starts = list(accumulate(self.sizes.values(), initial=0))
        self._passes: dict[int, tuple[int, NDArray[np.int64]]] = {}
        self._shares(self.start)  # whatever it refuses is refused before anything is trained

    @cached_property
    def steps(self) -> int:
        """Steps of an epoch: as many as the rows of all tasks fill; those left over open the next one."""
        rows = sum(self.sizes.values())
        if self.budget is None:
            return max(1, rows // self.batch_size)
        place, steps = self.start, -1
        while sum(place.drawn) <= rows:
            steps, place = steps + 1, self.batch(place)[1]
        return max(1, steps)

    @property
    def start(self) -> Place:
        """The place where nothing was drawn yet."""
        tasks = len(self.sizes)
        if self.sampler.in_order:
            firsts = [(task + 0.5) / tasks for task in range(tasks)]
        else:
            unit = self.group if self.one_task else 1
            firsts = (unit * np.random.default_rng([self.seed, 0]).random(tasks)).tolist()
        return Place(0, (0,) * tasks, tuple(firsts), {})

    def batch(self, place: Place) -> tuple[list[Draw], Place]:
        """Return the rows of the step at a place, and the place behind it."""
        shares = self._shares(place)
        draws: list[Draw] = []
        drawn, waits = list(place.drawn), list(place.waits)
        chosen = next_turn(waits, shares) if self.one_task else None
        while len(draws) + self.group <= self.batch_size:
            ahead_drawn, ahead_waits = list(drawn), list(waits)
            group = self._group(ahead_drawn, ahead_waits, shares, chosen)
            if not self._fits(draws + group):
                break
            draws, drawn, waits = draws + group, ahead_drawn, ahead_waits
        if chosen is not None:
            waits[chosen] += 1 if self.sampler.in_order else len(draws)
        return draws, Place(place.step + 1, tuple(drawn), tuple(waits), place.known)

    def state(self, place: Place) -> dict[str, Any]:
        """Return a place as plain values, with what it is a place in."""
        epoch, step = divmod(place.step, self.steps)
        by_task = {"drawn": place.drawn, "waits": place.waits}
        named = {key: dict(zip(self.sizes, values, strict=True)) for key, values in by_task.items()}
        known = {key: dict(values) for key, values in place.known.items()}
        return {**self._told, "epoch": epoch, "step": step, **named, "known": known}

    def place(self, state: Mapping[str, Any]) -> Place:
        """Return the place that `state` told.

        Raises:
            ValueError: It is a place in other data, or in another order of it.
        """
        own, told = self._told, {name: state.get(name) for name in self._told}
        sizes, before = own.pop("sizes"), told.pop("sizes") or {}
        if list(before) != list(sizes):
            changed = [f"tasks were {list(before)} and are {list(sizes)}"]
        else:
            rows = sizes.items()
            changed = [
                f"task {name} had {before[name]} rows and has {now}" for name, now in rows if before[name] != now
            ]
        changed += [f"{name} was {told[name]} and is {now}" for name, now in own.items() if told[name] != now]
        if changed:
            raise ValueError(
                f"the checkpoint was written with other training data: {', '.join(changed)}; go on with the same data "
                "and settings of it, or start a new run"
            )
        step = state["epoch"] * self.steps + state["step"]
        return Place(step, tuple(state["drawn"].values()), tuple(state["waits"].values()), state["known"])

    @property
    def _told(self) -> dict[str, Any]:
        """What tells this order from others, in plain values."""
        return {
            "seed": self.seed,
            "sizes": dict(self.sizes),
            "sampler": repr(self.sampler),
            "one_task": self.one_task,
            "batch_size": self.batch_size,
            "budget": None if self.budget is None else self.budget.told,
            "steps_per_epoch": self.steps,
        }

    def _shares(self, place: Place) -> list[float]:
        given = self.sampler.shares(self.sizes, place.step, place.known)
        shares = [float(given.get(name, 0.0)) for name in self.sizes]
        if not all(0 <= share < float("inf") for share in shares) or not sum(shares) > 0:
            raise ValueError(
                f"{type(self.sampler).__name__} gives shares {dict(given)} at step {place.step}; shares are finite, "
                "from 0 on, and one is above 0"
            )
        return shares

    def _group(self, drawn: list[int], waits: list[float], shares: list[float], chosen: int | None) -> list[Draw]:
        """Draw the fewest rows that a step grows by, moving counts and, where batches mix tasks, turns on."""
        draws = []
        for _ in range(self.group):
            task = next_turn(waits, shares) if chosen is None else chosen
            draws.append(self._draw(task, drawn[task]))
            drawn[task] += 1
            if chosen is None:
                waits[task] += 1
        return draws

    def _fits(self, draws: Sequence[Draw]) -> bool:
        """Tell whether a step may hold these rows."""
        if self.budget is None:
            return True
        return len(draws) * max(int(self.budget.lengths[draw.row]) for draw in draws) <= self.budget.tokens

    def _draw(self, task: int, index: int) -> Draw:
        turn, place = divmod(index, self._starts[task + 1] - self._starts[task])
        return Draw(self._starts[task] + int(self._shuffled(task, turn)[place]), turn)

    def _shuffled(self, task: int, turn: int) -> NDArray[np.int64]:
        """Return the order of a pass through a task's rows; the last one asked for is kept."""
        if self._passes.get(task, (None,))[0] != turn:
            self._passes.pop(task, None)  # first, so that two are never held
            rng = np.random.default_rng([self.seed, 1, task, turn])
            self._passes[task] = turn, rng.permutation(self._starts[task + 1] - self._starts[task])
        return self._passes[task][1]


def next_turn(waits: list[float], shares: Sequence[float]) -> int:
    """Return whose turn it is, and let the time pass until then.

    A task of share p waits w / p for its turn. With shares that stay, the j-th of its turns comes at (j + offset) / p,
    so that a stretch of time x has x p of them, give or take one; a wait that has begun goes on when shares change.

    Args:
        waits: How long each task waits yet, in turns of its own; changed, the one whose turn it is to 0.
        shares: Of the tasks, from 0, one above 0.
    """
    times = [wait / share if share else float("inf") for wait, share in zip(waits, shares, strict=True)]
    first = min(range(len(times)), key=times.__getitem__)
    for task, share in enumerate(shares):
        waits[task] = max(0.0, waits[task] - share * times[first])
    waits[first] = 0.0
    return first
