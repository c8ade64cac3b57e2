import pytest

from moadapt.sampling import Annealed, Capped, Dynamic, Sampler, Temperature

SIZES = {"a": 10_000, "b": 100}


def normalised(sampler: Sampler, step: int = 0, known: dict[str, dict[str, float]] | None = None) -> dict[str, float]:
    shares = sampler.shares(SIZES, step, known or {})
    return {name: share / sum(shares.values()) for name, share in shares.items()}


@pytest.mark.parametrize(("cap", "expected"), [(50, 1 / 2), (300, 3 / 4), (10**6, 100 / 101)])
def test_a_task_counts_for_no_more_rows_than_the_cap(cap: int, expected: float) -> None:
    assert normalised(Capped(cap=cap))["a"] == pytest.approx(expected)


@pytest.mark.parametrize(("temperature", "expected"), [(1.0, 100 / 101), (2.0, 10 / 11), (float("inf"), 1 / 2)])
def test_a_temperature_lies_between_proportional_and_uniform(temperature: float, expected: float) -> None:
    assert normalised(Temperature(temperature=temperature))["a"] == pytest.approx(expected)


@pytest.mark.parametrize(("step", "power"), [(0, 1.0), (5, 0.6), (10, 0.2), (99, 0.2)])
def test_the_power_of_the_sizes_moves_evenly_as_that_of_the_paper(step: int, power: float) -> None:
    expected = 10_000**power / (10_000**power + 100**power)
    assert normalised(Annealed(steps=10), step)["a"] == pytest.approx(expected)


def test_shares_follow_the_part_of_the_loss_that_is_left() -> None:
    sampler = Dynamic(floor=0.0)
    assert normalised(sampler) == {"a": 0.5, "b": 0.5}
    known = sampler.follow({}, {"a": 4.0, "b": 1.0})
    assert normalised(sampler, 9, known) == {"a": 0.5, "b": 0.5}  # all of it is left
    known = sampler.follow(known, {"a": 1.0, "b": 0.75})
    assert normalised(sampler, 9, known) == pytest.approx({"a": 0.25, "b": 0.75})
    assert normalised(Dynamic(floor=0.5), 9, known) == pytest.approx({"a": 0.375, "b": 0.625})
    assert normalised(Dynamic(floor=0.0, power=2.0), 9, known) == pytest.approx({"a": 0.1, "b": 0.9})


def test_a_goal_takes_the_place_of_the_first_loss() -> None:
    sampler = Dynamic(floor=0.0, goals={"a": 0.5})
    known = sampler.follow(sampler.follow({}, {"a": 4.0, "b": 1.0}), {"a": 1.0, "b": 1.0})
    assert normalised(sampler, 0, known) == pytest.approx({"a": 2 / 3, "b": 1 / 3})


def test_shares_follow_how_far_scores_are_below_their_goals() -> None:
    sampler = Dynamic(by="score", floor=0.0, goals={"a": 0.8})
    known = sampler.follow({}, {"a": 0.2, "b": 0.5})
    assert normalised(sampler, 0, known) == pytest.approx({"a": 0.75 / 1.25, "b": 0.5 / 1.25})
    known = sampler.follow(known, {"a": 0.9, "b": 0.5})
    assert normalised(sampler, 0, known) == {"a": 0.0, "b": 1.0}
    assert normalised(sampler, 0, sampler.follow(known, {"b": 1.0})) == {"a": 0.5, "b": 0.5}  # all goals are reached


def test_a_task_that_no_validation_showed_gets_the_mean_gap_and_one_left_out_keeps_its_own() -> None:
    sampler = Dynamic(by="score", floor=0.0)
    known = sampler.follow({}, {"a": 0.4})
    assert normalised(sampler, 0, known) == {"a": 0.5, "b": 0.5}
    known = sampler.follow(known, {"b": 0.8})
    assert normalised(sampler, 0, known) == pytest.approx({"a": 0.75, "b": 0.25})


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_task_keeps_its_number_where_a_validation_finds_none(value: float, caplog: pytest.LogCaptureFixture) -> None:
    sampler = Dynamic(floor=0.0)
    known = sampler.follow(sampler.follow({}, {"a": 4.0, "b": 2.0}), {"a": 1.0, "b": 1.5})
    assert sampler.follow(known, {"a": 0.5, "b": value}) == {**known, "last": {"a": 0.5, "b": 1.5}}
    assert f"the validation found {{'b': {value}}} for the loss" in caplog.text
    assert sampler.follow(sampler.follow({}, {"b": value}), {"b": 3.0}) == {"first": {"b": 3.0}, "last": {"b": 3.0}}


@pytest.mark.parametrize("power", [1e3, 1e300, float("inf")])
@pytest.mark.parametrize("gap", [1e-9, 1e9])
def test_the_largest_gap_gets_all_at_any_large_power(power: float, gap: float) -> None:
    known = {"first": {"a": 1.0, "b": 1.0}, "last": {"a": gap, "b": gap / 4}}
    assert normalised(Dynamic(floor=0.0, power=power), 0, known) == pytest.approx({"a": 1.0, "b": 0.0})
    assert normalised(Dynamic(floor=0.5, power=power), 0, known) == pytest.approx({"a": 0.75, "b": 0.25})


@pytest.mark.parametrize(
    ("part", "settings", "message"),
    [
        (Temperature, {"temperature": 0.5}, "temperature is 0.5; give at least 1"),
        (Temperature, {"temperature": float("nan")}, "temperature is nan; give at least 1"),
        (Annealed, {"start": 0.0}, "start is 0.0; give at least 1"),
        (Annealed, {"end": -1.0}, "end is -1.0; give at least 1"),
        (Annealed, {"steps": 0}, "steps is 0; give at least 1"),
        (Capped, {"cap": 0}, "cap is 0; give at least 1"),
        (Dynamic, {"goals": {"a": 0.0, "b": 1.0}}, r"goals are \{'a': 0.0\}; give finite losses or scores"),
        (Dynamic, {"goals": {"a": float("inf")}}, r"goals are \{'a': inf\}; give finite losses or scores"),
        (Dynamic, {"power": -1.0}, "power is -1.0 and floor 0.2; give a power from 0"),
        (Dynamic, {"floor": 1.5}, "power is 1.0 and floor 1.5; give a power from 0, a floor from 0 to 1"),
        (Dynamic, {"by": "luck"}, "by is 'luck'; give loss or score"),
    ],
)
def test_settings_out_of_range_are_refused(part: type[Sampler], settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        part(**settings)
