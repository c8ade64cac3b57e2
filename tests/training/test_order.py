import json
from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from moadapt.sampling import Annealed, Dynamic, Proportional, RoundRobin, Sampler, Temperature, Uniform
from moadapt.training.order import Budget, Draw, MixedOrder, Place, next_turn


def named(*sizes: int) -> dict[str, int]:
    return {f"task {index}": size for index, size in enumerate(sizes)}


def steps(order: MixedOrder, count: int, place: Place | None = None) -> list[list[Draw]]:
    """The next steps from a place, or from the start."""
    place, found = place or order.start, []
    for _ in range(count):
        draws, place = order.batch(place)
        found.append(draws)
    return found


def epoch(order: MixedOrder, number: int = 0) -> list[list[Draw]]:
    return steps(order, (number + 1) * order.steps)[number * order.steps :]


@pytest.mark.parametrize("sizes", [(20, 12), (29, 2, 1), (1,) * 32])
@pytest.mark.parametrize("number", [0, 1, 6])
def test_an_epoch_of_proportional_shares_takes_every_row_once(sizes: tuple[int, ...], number: int) -> None:
    order = MixedOrder(named(*sizes), 8, Proportional(), seed=0)
    rows = [draw.row for batch in epoch(order, number) for draw in batch]
    assert order.steps == 4
    assert sorted(rows) == list(range(32))


def test_every_batch_mixes_tasks_in_their_shares() -> None:
    order = MixedOrder(named(60, 20), 8, Proportional(), seed=3)
    for batch in epoch(order, 1):
        assert abs(sum(draw.row < 60 for draw in batch) - 6) <= 1


@pytest.mark.parametrize(
    ("sampler", "share"),
    [
        (Proportional(), 64 / 80),
        (Uniform(), 1 / 2),
        (RoundRobin(), 1 / 2),
        (Temperature(temperature=2.0), 8 / 12),
        (Temperature(temperature=3.0), 4 / (4 + 16 ** (1 / 3))),
        (Temperature(temperature=float("inf")), 1 / 2),
    ],
)
@pytest.mark.parametrize("one_task", [False, True])
def test_shares_follow_the_sampler(sampler: Sampler, share: float, one_task: bool) -> None:
    order = MixedOrder(named(64, 16), 8, sampler, seed=0, one_task=one_task)
    rows = [draw.row for batch in epoch(order, 0) for draw in batch]
    assert len(rows) == 80
    assert abs(sum(row < 64 for row in rows) - share * 80) <= (8 if one_task else 1)


def test_rows_that_an_epoch_leaves_out_come_first_in_the_next() -> None:
    order = MixedOrder(named(7), 3, Proportional(), seed=0)
    first, second = ([d.row for batch in epoch(order, n) for d in batch] for n in (0, 1))
    assert {second[0], *first} == set(range(7))


def test_a_batch_is_a_function_of_seed_and_place() -> None:
    place = MixedOrder(named(9, 9), 6, Proportional(), 4).batch(MixedOrder(named(9, 9), 6, Proportional(), 4).start)[1]
    made = [MixedOrder(named(9, 9), 6, Proportional(), seed).batch(place) for seed in (4, 4, 5)]
    assert made[0] == made[1]
    assert made[0][0] != made[2][0]


def test_a_batch_of_more_rows_than_there_are_takes_them_in_turns() -> None:
    [draws] = steps(MixedOrder(named(2), 5, Uniform(), 0), 1)
    assert Counter(draw.turn for draw in draws) == {0: 2, 1: 2, 2: 1}


def test_many_small_tasks_do_not_come_all_at_once() -> None:
    """Of twenty tasks of one row, a stretch of a sixth of the rows has about a sixth."""
    order = MixedOrder(named(*[1] * 20, 100), 20, Proportional(), seed=0)
    assert max(sum(draw.row < 20 for draw in batch) for batch in epoch(order)) < 8


def test_round_robin_goes_through_the_tasks_in_their_order() -> None:
    sizes = named(40, 3, 9)
    mixed = [draw for batch in steps(MixedOrder(sizes, 5, RoundRobin(), seed=7), 6) for draw in batch]
    assert [task(sizes, draw) for draw in mixed] == [index % 3 for index in range(30)]
    alone = steps(MixedOrder(sizes, 5, RoundRobin(), seed=7, one_task=True), 9)
    assert [{task(sizes, draw) for draw in batch} for batch in alone] == [{index % 3} for index in range(9)]


def test_an_annealed_temperature_moves_from_step_to_step() -> None:
    sizes, sampler = named(900, 100), Annealed(start=1.0, end=float("inf"), steps=100)
    found = steps(MixedOrder(sizes, 100, sampler, seed=0), 120)
    of_first = [sum(draw.row < 900 for draw in batch) for batch in found]
    for step in (0, 50, 100, 119):
        power = max(0.0, 1 - step / 100)
        assert abs(of_first[step] - 100 * 900**power / (900**power + 100**power)) <= 2


def test_a_task_without_a_share_has_no_turn_and_others_go_on() -> None:
    waits = [0.5, 0.25, 0.75]
    assert next_turn(waits, [1.0, 0.0, 2.0]) == 2  # it waits 0.375, the first 0.5
    assert waits == [0.125, 0.25, 0.0]


def task(sizes: dict[str, int], draw: Draw) -> int:
    return int(np.searchsorted(np.cumsum(list(sizes.values())), draw.row, side="right"))


@dataclass(frozen=True, kw_only=True)
class Wrong(Sampler):
    """Shares as they are given."""

    given: dict[str, float]

    def shares(self, *_: Any) -> dict[str, float]:
        return self.given


@pytest.mark.parametrize("given", [{}, {"task 0": -1.0, "task 1": 2.0}, {"task 0": float("nan"), "task 1": 1.0}])
def test_shares_that_are_none_are_refused(given: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=r"Wrong gives shares .* at step 0; shares are finite, from 0 on"):
        MixedOrder(named(4, 4), 2, Wrong(given=given), 0)


def test_goals_of_tasks_that_are_none_are_refused() -> None:
    with pytest.raises(ValueError, match=r"goals are given for \['task 2'\].*the tasks are \['task 0', 'task 1'\]"):
        MixedOrder(named(4, 4), 2, Dynamic(goals={"task 1": 1.0, "task 2": 1.0}), 0)


@pytest.mark.parametrize(("sizes", "batch_size"), [((), 2), ((3, 0), 2), ((3, 3), 0)])
def test_tasks_and_batches_without_rows_are_refused(sizes: tuple[int, ...], batch_size: int) -> None:
    with pytest.raises(ValueError, match="every task needs a row, and a step at least 1"):
        MixedOrder(named(*sizes), batch_size, Uniform(), 0)


def budget(tokens: int, multiple: int, *sizes: int) -> Budget:
    """Lengths from 5 to 24, those of a task alike."""
    rng = np.random.default_rng(0)
    lengths = [5 + 4 * index + rng.integers(8, size=size) for index, size in enumerate(sizes)]
    return Budget(tokens, multiple, np.concatenate(lengths))


@pytest.mark.parametrize("one_task", [False, True])
def test_a_budget_of_tokens_is_kept_and_used(one_task: bool) -> None:
    given = budget(400, 4, 50, 40, 30)
    order = MixedOrder(named(50, 40, 30), 60, Proportional(), 0, one_task=one_task, budget=given)
    for draws in steps(order, 3 * order.steps):
        longest = max(given.lengths[draw.row] for draw in draws)
        assert len(draws) % 4 == 0
        assert len(draws) * longest <= 400
        most = max(longest, given.lengths.max())  # four more rows need not be as long as these
        assert (len(draws) + 4) * most > 400 or len(draws) == 60


def test_an_epoch_by_tokens_ends_before_a_row_comes_twice() -> None:
    order = MixedOrder(named(50, 40), 60, Proportional(), 0, budget=budget(400, 4, 50, 40))
    rows = [draw.row for batch in epoch(order) for draw in batch]
    assert len(set(rows)) == len(rows)
    assert 90 - 400 // 5 < len(rows) <= 90


def test_batches_by_tokens_are_not_larger_than_the_batch_size() -> None:
    order = MixedOrder(named(50, 40), 8, Proportional(), 0, budget=budget(4000, 4, 50, 40))
    assert {len(draws) for draws in steps(order, 20)} == {8}


def test_rows_too_long_for_a_budget_are_refused() -> None:
    with pytest.raises(ValueError, match=r"batch_tokens is 95, and 4 rows .* 24 tokens do not .* at least 96"):
        Budget(95, 4, np.array([7, 24, 11]))


def test_a_batch_size_below_the_multiple_is_refused() -> None:
    with pytest.raises(ValueError, match=r"batch_size is 3 .* a step at least 4"):
        MixedOrder(named(50, 40), 3, Proportional(), 0, budget=budget(400, 4, 50, 40))


def test_a_place_in_another_order_is_refused() -> None:
    """Whatever it differs in, though steps of an epoch are as many."""
    given: dict[str, Any] = {"sizes": {"a": 20, "b": 20}, "batch_size": 16, "sampler": Proportional(), "seed": 0}
    own = MixedOrder(**given)
    state = json.loads(json.dumps(own.state(own.batch(own.start)[1])))
    assert own.place(state) == own.batch(own.start)[1]
    assert own.steps == 2
    others = {
        "seed was 0 and is 1": {"seed": 1},
        "task a had 20 rows and has 22": {"sizes": {"a": 22, "b": 20}},
        r"tasks were \['a', 'b'\] and are \['b', 'a'\]": {"sizes": {"b": 20, "a": 20}},
        r"sampler was Proportional\(\) and is Temperature\(temperature=2.0\)": {"sampler": Temperature()},
        "one_task was False and is True": {"one_task": True},
        "batch_size was 16 and is 18": {"batch_size": 18},
        "budget was None and is {'tokens': 400, 'multiple': 4, 'all_lengths':": {"budget": budget(400, 4, 20, 20)},
    }
    for message, changed in others.items():
        with pytest.raises(ValueError, match=message):
            MixedOrder(**{**given, **changed}).place(state)
    by_tokens = MixedOrder(**given, budget=budget(400, 4, 20, 20))
    with pytest.raises(ValueError, match=r"budget was \{'tokens': 400.* and is \{'tokens': 402"):
        MixedOrder(**given, budget=budget(402, 4, 20, 20)).place(by_tokens.state(by_tokens.start))
