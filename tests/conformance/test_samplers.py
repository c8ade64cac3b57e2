"""What every sampler keeps to, however batches are made and on however many processes."""

import json
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from itertools import chain, repeat
from typing import Any

import numpy as np
import pytest
import torch

from moadapt.registry import SAMPLERS
from moadapt.sampling import Sampler
from moadapt.task import Example
from moadapt.training.batch import Batch
from moadapt.training.collate import Item
from moadapt.training.loaders import Rows, TrainLoader
from moadapt.training.order import Budget, Draw, MixedOrder

SIZES = {"large": 90, "middle": 31, "small": 7}
FOUND = {4: {"large": 0.9, "middle": 0.6, "small": 0.3}, 11: {"large": 0.8, "middle": 0.1, "small": 0.2}}
"""What validations find after some steps."""
TOKENS = 720
MULTIPLE = 12
BATCHES = [(one_task, tokens) for one_task in (False, True) for tokens in (False, True)]


@pytest.fixture(params=SAMPLERS.names())
def sampler(request: pytest.FixtureRequest) -> Sampler:
    made: Sampler = SAMPLERS.get(request.param)()
    return made


@pytest.fixture(params=BATCHES, ids=lambda pair: f"{'alone' if pair[0] else 'mixed'}-{'tokens' if pair[1] else 'rows'}")
def order(sampler: Sampler, request: pytest.FixtureRequest) -> MixedOrder:
    return ordered(sampler, *request.param)


def ordered(sampler: Sampler, one_task: bool = False, tokens: bool = False, seed: int = 3) -> MixedOrder:
    lengths = np.random.default_rng(0).integers(8, 40, size=sum(SIZES.values()))
    budget = Budget(TOKENS, MULTIPLE, lengths) if tokens else None
    return MixedOrder(SIZES, 48 if tokens else 10, sampler, seed, one_task=one_task, budget=budget)


def steps(order: MixedOrder, count: int) -> list[list[Draw]]:
    """The rows of the first steps, with validations where they are due."""
    place, found = order.start, []
    for step in range(1, count + 1):
        draws, place = order.batch(place)
        found.append(draws)
        if order.sampler.reads and step in FOUND:
            known = order.sampler.follow(place.known, FOUND[step])
            place = order.place({**order.state(place), "known": known})
    return found


def shown(sampler: Sampler, count: int) -> set[str]:
    """The tasks that have a share in one of the first steps."""
    return {name for step in range(count) for name, share in sampler.shares(SIZES, step, {}).items() if share}


def task_of(draw: Draw) -> str:
    return list(SIZES)[int(np.searchsorted(np.cumsum(list(SIZES.values())), draw.row, side="right"))]


def test_shares_are_given_for_all_tasks_at_any_step(sampler: Sampler) -> None:
    for sizes in ({"only": 1}, SIZES, {"huge": 10**9, "tiny": 1}):
        for step in (0, 1, 10**6):
            shares = sampler.shares(sizes, step, {})
            assert list(shares) == list(sizes)
            assert all(np.isfinite(share) and share >= 0 for share in shares.values())
            assert sum(shares.values()) > 0


def test_a_sampler_holds_no_state(sampler: Sampler) -> None:
    shares = sampler.shares(SIZES, 5, {})
    if sampler.reads:
        assert sampler.shares(SIZES, 5, sampler.follow({}, FOUND[4])).keys() == shares.keys()
    sampler.shares(SIZES, 50, {})
    assert sampler.shares(SIZES, 5, {}) == shares


def test_rows_are_drawn_in_the_shares(sampler: Sampler) -> None:
    order, expected = ordered(sampler), dict.fromkeys(SIZES, 0.0)
    for step, draws in enumerate(steps(order, 3)):
        shares = sampler.shares(SIZES, step, {})
        expected = {name: expected[name] + len(draws) * shares[name] / sum(shares.values()) for name in SIZES}
    found = Counter(task_of(draw) for batch in steps(order, 3) for draw in batch)
    assert all(abs(found[name] - expected[name]) < 2 for name in SIZES)


def test_the_same_seed_is_the_same_order_and_another_is_another(sampler: Sampler) -> None:
    same, again, other = (steps(ordered(sampler, seed=seed), 9) for seed in (3, 3, 4))
    assert same == again
    assert same != other


def test_no_row_comes_a_second_time_before_all_others_of_its_task(order: MixedOrder) -> None:
    turns: dict[str, list[int]] = defaultdict(list)
    rows: dict[tuple[str, int], list[int]] = defaultdict(list)
    for draw in (draw for batch in steps(order, 40) for draw in batch):
        turns[task_of(draw)].append(draw.turn)
        rows[task_of(draw), draw.turn].append(draw.row)
    assert set(turns) == shown(order.sampler, 40)
    for (name, turn), own in rows.items():
        assert len(set(own)) == len(own)
        assert len(own) == SIZES[name] or turn == max(turns[name])
    assert all(own == sorted(own) for own in turns.values())


def test_a_batch_of_one_task_holds_no_other(sampler: Sampler) -> None:
    for tokens in (False, True):
        found = [{task_of(draw) for draw in batch} for batch in steps(ordered(sampler, True, tokens), 30)]
        assert {len(tasks) for tasks in found} == {1}
        assert {name for tasks in found for name in tasks} == shown(sampler, 30)


class Texts(Sequence[Example]):
    """Rows without pictures."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, row: Any) -> Any:
        return Example((), "", ("",), "", f"row {row}")


def bare(items: Sequence[Item]) -> Batch:
    """A batch of rows and nothing else."""
    rows = torch.tensor([item.row for item in items])
    return Batch({}, [item.task for item in items], rows, [item.example for item in items])


ROWS = Rows({name: Texts(size) for name, size in SIZES.items()})


def trained(order: MixedOrder, *runs: tuple[int, int], workers: int = 0) -> list[list[list[int]]]:
    """Train in runs, each on a number of processes up to a step; return the rows of every step by process."""
    found: list[list[list[int]]] = []
    state: dict[str, Any] | None = None
    for processes, stop in runs:
        loaders = [TrainLoader(ROWS, order, bare, workers, each, processes) for each in range(processes)]  # type: ignore[arg-type]
        for loader in loaders:
            loader.load_state_dict(loader.state_dict() if state is None else json.loads(json.dumps(state)))
        endless: list[Iterator[Batch]] = [chain.from_iterable(repeat(loader)) for loader in loaders]
        while len(found) < stop:
            found.append([next(batches).rows.tolist() for batches in endless])
            if order.sampler.reads and len(found) in FOUND:
                for loader in loaders:
                    loader.follow(FOUND[len(found)])
        states = [loader.state_dict() for loader in loaders]
        assert all(each == states[0] for each in states)
        state = states[0]
    return found


def union(step: list[list[int]]) -> list[int]:
    return [row for part in step for row in part]


@pytest.mark.parametrize("first", [1, 2, 3, 4])
def test_a_run_goes_on_with_any_number_of_processes_wherever_it_stopped(order: MixedOrder, first: int) -> None:
    length = order.steps + 3
    whole = [union(step) for step in trained(order, (1, length))]
    rng = np.random.default_rng(first)
    for second in (1, 2, 3, 4):
        one, two = sorted(rng.choice(range(1, length), 2, replace=False).tolist())
        found = trained(order, (first, one), (second, two), (first % 4 + 1, length))
        assert [union(step) for step in found] == whole


def test_processes_share_the_rows_of_a_step_evenly(order: MixedOrder) -> None:
    for processes in (2, 3, 4):
        for step in trained(order, (processes, 12)):
            sizes = [len(part) for part in step]
            assert max(sizes) - min(sizes) <= (0 if order.budget else 1)
            assert min(sizes) > 0
            if order.budget:
                tokens = [len(part) * max(order.budget.lengths[row] for row in part) for part in step]
                assert max(tokens) <= TOKENS / processes


@pytest.mark.parametrize("processes", [5, 7])
def test_processes_that_could_not_keep_to_their_part_of_the_tokens_are_refused(processes: int) -> None:
    order = ordered(SAMPLERS.get("uniform")(), tokens=True)
    with pytest.raises(
        ValueError, match=rf"batch_multiple is 12 and there are {processes} .* a multiple of {processes}"
    ):
        TrainLoader(ROWS, order, bare, 0, 0, processes)  # type: ignore[arg-type]


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_workers_that_prepare_ahead_change_nothing() -> None:
    order = ordered(SAMPLERS.get("dynamic")())
    assert trained(order, (1, 15), workers=2) == trained(order, (1, 15))
