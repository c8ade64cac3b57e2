from collections import Counter

import numpy as np
import pytest

from moadapt.training.order import Draw, MixedOrder, spread


def epoch(order: MixedOrder, number: int) -> list[list[Draw]]:
    return [order.batch(number, step) for step in range(order.steps)]


def test_an_epoch_of_proportional_shares_takes_every_row_once() -> None:
    order = MixedOrder([20, 12], batch_size=8, sampling="proportional", seed=0)
    rows = [draw.row for batch in epoch(order, 0) for draw in batch]
    assert order.steps == 4
    assert sorted(rows) == list(range(32))


def test_every_batch_mixes_tasks_in_their_shares() -> None:
    order = MixedOrder([60, 20], batch_size=8, sampling="proportional", seed=3)
    for batch in epoch(order, 1):
        assert abs(sum(draw.row < 60 for draw in batch) - 6) <= 1


@pytest.mark.parametrize(
    ("sampling", "share"),
    [("proportional", 64 / 80), ("uniform", 1 / 2), (2.0, 8 / 12), (3.0, 4 / (4 + 16 ** (1 / 3)))],
)
def test_shares_follow_the_sampling(sampling: str | float, share: float) -> None:
    order = MixedOrder([64, 16], batch_size=8, sampling=sampling, seed=0)
    rows = [draw.row for batch in epoch(order, 0) for draw in batch]
    assert len(rows) == 80
    assert abs(sum(row < 64 for row in rows) - share * 80) <= 1


def test_a_row_comes_again_only_after_all_others_of_its_task() -> None:
    order = MixedOrder([10, 3], batch_size=4, sampling="uniform", seed=5)
    draws = [draw for number in range(6) for batch in epoch(order, number) for draw in batch]
    for start, size in ((0, 10), (10, 3)):
        own = [draw for draw in draws if start <= draw.row < start + size]
        by_turn = [[d.row for d in sorted(own, key=lambda d: d.turn) if d.turn == turn] for turn in range(own[-1].turn)]
        assert len(by_turn) > 1
        assert all(sorted(rows) == list(range(start, start + size)) for rows in by_turn)
        assert by_turn[0] != by_turn[1]


def test_rows_that_an_epoch_leaves_out_come_first_in_the_next() -> None:
    order = MixedOrder([7], batch_size=3, sampling="proportional", seed=0)
    first, second = ([d.row for batch in epoch(order, n) for d in batch] for n in (0, 1))
    assert {second[0], *first} == set(range(7))


def test_a_batch_is_a_function_of_seed_epoch_and_step() -> None:
    made = [MixedOrder([9, 9], 6, "proportional", seed).batch(2, 1) for seed in (4, 4, 5)]
    assert made[0] == made[1]
    assert made[0] != made[2]


def test_counts_fill_the_epoch_and_no_task_is_left_out() -> None:
    for sizes in ([1000, 1], [5, 5, 5], [17, 3, 90, 1]):
        order = MixedOrder(sizes, batch_size=4, sampling="proportional", seed=0)
        assert sum(order.counts) == order.steps * 4
        assert min(order.counts) >= 1
        assert np.allclose(order.counts, np.array(sizes) / sum(sizes) * order.steps * 4, atol=1)
    assert Counter(MixedOrder([2], 5, 1.0, 0).batch(0, 0)[i].turn for i in range(5)) == {0: 2, 1: 2, 2: 1}


@pytest.mark.parametrize("sampling", ["even", 0.5, float("nan")])
def test_an_impossible_sampling_is_refused(sampling: str | float) -> None:
    with pytest.raises(ValueError, match="proportional"):
        MixedOrder([4, 4], 2, sampling, 0)  # type: ignore[arg-type]


@pytest.mark.parametrize(("sizes", "batch_size"), [([], 2), ([3, 0], 2), ([3, 3], 1)])
def test_tasks_without_rows_or_room_are_refused(sizes: list[int], batch_size: int) -> None:
    with pytest.raises(ValueError, match="at least one row a task"):
        MixedOrder(sizes, batch_size, "uniform", 0)


def test_many_tiny_tasks_do_not_lengthen_an_epoch() -> None:
    order = MixedOrder((*[1] * 20, 99), batch_size=60, sampling="proportional", seed=0)
    drawn = [draw.row for step in range(order.steps) for draw in order.batch(0, step)]
    assert len(drawn) == order.steps * 60
    assert len(set(drawn)) == len(drawn)
    assert set(range(20)) <= set(drawn)


@pytest.mark.parametrize("counts", [[1], [5, 5], [1, 100], [3, 1, 4, 1, 5, 9], [1] * 40, [1000, 2, 77]])
def test_a_stretch_of_merged_lists_is_that_of_all_places_sorted(counts: list[int]) -> None:
    for offsets in ([0.5] * len(counts), np.random.default_rng(0).random(len(counts)).tolist()):
        pairs = [((j + offsets[i]) / count, i, j) for i, count in enumerate(counts) for j in range(count)]
        merged = [(i, j) for _, i, j in sorted(pairs)]
        for length in (1, 7):
            for start in range(0, sum(counts), length):
                stop = min(start + length, sum(counts))
                assert spread(counts, offsets, start, stop) == merged[start:stop]


def test_a_step_late_in_a_huge_epoch_costs_no_more_than_an_early_one() -> None:
    order = MixedOrder([2**40, 2**20], batch_size=64, sampling="proportional", seed=0)
    places = spread(order.counts, [0.3, 0.6], order.steps * 64 - 64, order.steps * 64)  # in memory, 8 TiB
    assert len(places) == 64
    assert places[-1] in {(0, order.counts[0] - 1), (1, order.counts[1] - 1)}
