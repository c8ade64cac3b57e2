"""Ranks by depth: the published steps, one tower at a time, and a budget that is never exceeded."""

import pytest

from moadapt import Placement, anatomy, attach
from moadapt.adapters import Bottleneck, LoRA
from moadapt.mixture_spec import MixtureSpec
from moadapt.ranks import DepthSchedule
from moadapt.ranks.allocator import cost_of, lora_banks, ranks_of
from moadapt.sites import Anatomy, Site
from moadapt.towers import Tower
from moadapt_routers import ByTask
from tests.models import tiny_llava

EVERYWHERE = Placement(towers=("vision", "connector", "language"))
WIDE = 10


def blocks(tower: str, count: int) -> tuple[Tower, list[Site]]:
    paths = tuple(f"{tower}.{i}" for i in range(count))
    sites = [Site(f"{path}.q_proj", tower, "attention", i, WIDE, WIDE) for i, path in enumerate(paths)]
    return Tower(tower, tower, paths, count, (count,)), sites


def planned(schedule: DepthSchedule, counts: dict[str, int]) -> dict[str, list[int]]:
    """Ranks of a shared LoRA in each tower, first block to last."""
    found = {tower: blocks(tower, count) for tower, count in counts.items()}
    parts = Anatomy(tuple(tower for tower, _ in found.values()), tuple(s for _, sites in found.values() for s in sites))
    spec = schedule.plan(MixtureSpec({}, LoRA(rank=4), None, Placement(towers=tuple(counts))), parts).shared
    assert isinstance(spec, LoRA)
    return {tower: [spec.rank_at(site) for site in sites] for tower, (_, sites) in found.items()}


def test_twelve_blocks_get_the_published_ranks() -> None:
    assert planned(DepthSchedule(), {"language": 12}) == {"language": 3 * [8] + 6 * [32] + 3 * [16]}


def test_each_tower_has_a_depth_and_may_have_steps_of_its_own() -> None:
    schedule = DepthSchedule(towers={"vision": ((0.5, 2), (1.0, 5))})
    assert planned(schedule, {"vision": 4, "language": 4}) == {"vision": [2, 2, 5, 5], "language": [8, 32, 32, 16]}


@pytest.mark.parametrize("budget", [240, 259, 260, 1000, 1999, 2400])
def test_a_budget_is_met_from_below_to_less_than_a_rank(budget: int) -> None:
    ranks = planned(DepthSchedule(parameters=budget), {"language": 12})["language"]
    spent = sum(ranks) * 2 * WIDE
    assert budget - 2 * WIDE < spent <= budget
    assert min(ranks) >= 1
    parts = (ranks[:3], ranks[3:9], ranks[9:])
    assert all(max(part) - min(part) <= 1 for part in parts)
    assert max(parts[0]) <= min(parts[2])
    assert max(parts[2]) <= min(parts[1])


def test_no_rank_rises_above_the_widths_of_its_site() -> None:
    assert planned(DepthSchedule(parameters=100_000), {"language": 12}) == {"language": 12 * [WIDE]}


def test_a_budget_counts_all_loras_and_leaves_the_connector_and_other_families_alone() -> None:
    base, budget = tiny_llava(), 20_000
    experts = {"a": LoRA(rank=4), "b": Bottleneck(), "c": LoRA(rank=2)}
    spec = MixtureSpec(experts, None, ByTask(), EVERYWHERE)
    planned = DepthSchedule(parameters=budget).plan(spec, anatomy(base))
    assert planned.experts["b"] == experts["b"]
    ranks = ranks_of(planned, anatomy(base))
    assert {(n, r) for n, own in ranks.items() for s, r in own.items() if s.tower == "connector"} == {
        ("a", 4),
        ("c", 2),
    }
    spent = sum(rank * cost_of(site) for own in ranks.values() for site, rank in own.items())
    assert budget - max(cost_of(site) for site in ranks["a"]) < spent <= budget
    mixture = attach(base, experts=planned.experts, router=ByTask(), placement=EVERYWHERE)
    counted = sum(bank.state(n)[part].numel() for _, bank in lora_banks(mixture.banks()) for n in bank.names
                  for part in ("down", "up"))  # fmt: skip
    assert counted == spent


def test_a_connector_alone_keeps_its_rank_under_any_budget() -> None:
    parts = anatomy(tiny_llava())
    spec = MixtureSpec({}, LoRA(rank=4), None, Placement(towers=("connector",)))
    assert ranks_of(DepthSchedule(parameters=100_000).plan(spec, parts), parts) == ranks_of(spec, parts)


def test_a_mixture_without_loras_and_a_tower_that_there_is_not_are_refused() -> None:
    with pytest.raises(ValueError, match="ranks by depth need LoRAs; this mixture has none"):
        DepthSchedule().plan(MixtureSpec({}, Bottleneck(), None, Placement()), anatomy(tiny_llava()))
    with pytest.raises(ValueError, match="a depth schedule names visoin; choose from vision"):
        DepthSchedule(towers={"visoin": ((1.0, 4),)})


def test_a_budget_below_rank_one_is_refused() -> None:
    with pytest.raises(ValueError, match="parameters=239; rank 1 in every block takes 240"):
        planned(DepthSchedule(parameters=239), {"language": 12})


@pytest.mark.parametrize("steps", [(), ((0.5, 8),), ((0.5, 8), (0.5, 4), (1.0, 2)), ((0.5, 0), (1.0, 2))])
def test_steps_that_are_no_schedule_are_refused(steps: tuple[tuple[float, int], ...]) -> None:
    with pytest.raises(ValueError, match="a depth schedule"):
        DepthSchedule(steps=steps)


def test_a_planned_mixture_has_those_ranks_and_the_scale_of_its_own() -> None:
    spec = MixtureSpec({}, LoRA(rank=4, alpha=2.0), None, EVERYWHERE)
    base = tiny_llava()
    plain = attach(base, shared=spec.shared, placement=EVERYWHERE)
    plain.detach()
    new = DepthSchedule().plan(spec, plain.anatomy).shared
    mixture = attach(base, shared=new, placement=EVERYWHERE)
    found = {site: len(bank.state("shared")["up"]) for site, bank in mixture.banks()}
    # three language blocks lie at depths 0, 1/3 and 2/3, four vision blocks at 0, 1/4, 1/2, 3/4 with the last not read
    assert {(s.tower, s.layer, rank) for s, rank in found.items()} == {
        *(("language", layer, rank) for layer, rank in enumerate((8, 32, 32))),
        *(("vision", layer, rank) for layer, rank in enumerate((8, 32, 32))),
        ("connector", None, 4),
    }
    assert new is not None
    assert new.scale == spec.shared.scale == 0.5
