"""Ranks by explained variance: planted spectra, budgets, and what is refused."""

from typing import Any

import pytest
import torch
from torch import Tensor

from moadapt import MixtureSpec, Placement, anatomy
from moadapt.adapters import Bias, LoRA
from moadapt.ranks import ExplainedVariance
from moadapt.ranks.allocator import cost_of, ranks_of
from moadapt.ranks.explained_variance import shares
from moadapt.sites import Anatomy, Site
from moadapt_routers import ByTask
from tests.models import tiny_llama

ONE_KIND, EVERY = Placement(modules=("q_proj",)), Placement(kinds=("attention", "mlp"))


@pytest.fixture(scope="module")
def found() -> Anatomy:
    return anatomy(tiny_llama())


def spec_of(*ranks: int, placement: Placement = ONE_KIND) -> MixtureSpec:
    """A shared adapter, then experts, with these ranks."""
    shared, *experts = (LoRA(rank=rank) for rank in ranks)
    return MixtureSpec(dict(zip("abc", experts, strict=False)), shared, ByTask() if experts else None, placement)


def planted(width: int, strong: int, size: float = 1.0, seed: int = 0) -> Tensor:
    """The mean outer product of inputs with so many strong directions, and a hundredth of their variance elsewhere."""
    turned = torch.linalg.qr(torch.randn(width, width, generator=torch.Generator().manual_seed(seed))).Q
    values = torch.full((width,), 0.01)
    values[:strong] = 1.0 + torch.arange(strong) / 100
    return size * (turned * values) @ turned.T


def test_sites_get_as_many_ranks_as_they_have_strong_directions(found: Anatomy) -> None:
    spec, allocator = spec_of(5, 5), ExplainedVariance()
    sites = allocator.reads(spec, found)
    strong = [2, 8, 5]
    means = {site: planted(32, n, 10.0**n, n) for site, n in zip(sites, strong, strict=True)}  # sizes do not count
    new = ranks_of(allocator.plan(spec, found, means), found)
    assert new == {name: dict(zip(sites, strong, strict=True)) for name in ("shared", "a")}


def test_shares_are_squared_singular_values_over_their_sum() -> None:
    x = torch.randn(50, 6, dtype=torch.float64)
    squares = torch.linalg.svdvals(x).square()
    torch.testing.assert_close(shares(x.T @ x / 50), squares / squares.sum())
    assert not shares(torch.zeros(3, 3)).any()


@pytest.mark.parametrize("unit", ["ranks", "parameters"])
@pytest.mark.parametrize(("least", "most"), [(1, None), (2, 6), (1, 100)], ids=str)
def test_the_budget_is_spent_and_never_exceeded(found: Anatomy, unit: Any, least: int, most: int | None) -> None:
    spec = spec_of(4, 3, placement=EVERY)
    allocator = ExplainedVariance(unit=unit, least=least, most=most)
    sites = allocator.reads(spec, found)
    means = {site: planted(site.in_features, 1 + i % 7, seed=i) for i, site in enumerate(sites)}
    new = ranks_of(allocator.plan(spec, found, means), found)
    cost = {site: cost_of(site) if unit == "parameters" else 1 for site in sites}
    for name, rank in (("shared", 4), ("a", 3)):
        budget, spent = (sum(cost[s] * r for s, r in own.items()) for own in (dict.fromkeys(sites, rank), new[name]))
        assert budget - max(cost.values()) < spent <= budget
        highest = {site: min(most or 2 * rank, site.in_features, site.out_features) for site in sites}
        assert all(least <= new[name][site] <= highest[site] for site in sites)
    assert len(set(new["shared"].values())) > 2


def test_ties_go_to_the_first_site(found: Anatomy) -> None:
    spec, allocator = spec_of(4), ExplainedVariance(least=3, most=6)
    same = planted(32, 6)
    first, second, third = sites = allocator.reads(spec, found)
    new = ranks_of(allocator.plan(spec, found, dict.fromkeys(sites, same)), found)["shared"]
    assert new == {first: 4, second: 4, third: 4}
    one_more = ExplainedVariance(least=3, most=6, unit="ranks")
    raised = MixtureSpec({}, LoRA(rank=4, ranks={third.path: 5}), None, ONE_KIND)
    assert ranks_of(one_more.plan(raised, found, dict.fromkeys(sites, same)), found)["shared"][first] == 5


def test_absent_and_unnamed_adapters_and_other_forms_stay(found: Anatomy) -> None:
    layers = [site for site in found.sites if site.path.endswith("q_proj")]
    table = Site("model.embed_tokens", "language", "embedding", None, 64, 32)
    spec = MixtureSpec(
        {"a": LoRA(rank=4, ranks={layers[0].path: 0}), "b": LoRA(rank=4), "c": Bias()}, None, ByTask(),
        Placement(kinds=("attention", "embedding")),
    )  # fmt: skip
    allocator = ExplainedVariance(adapters=("a",))
    sites = allocator.reads(spec, found)
    assert layers[0] not in sites
    assert all(site.form == "linear" for site in sites)
    before = ranks_of(spec, found)
    after = ranks_of(allocator.plan(spec, found, {s: planted(32, 1 + i) for i, s in enumerate(sites)}), found)
    assert after["b"] == before["b"]
    assert after["a"] != before["a"]
    changed = {site for site in before["a"] if before["a"][site] != after["a"][site]}
    assert changed <= set(sites)
    assert any(site.path == table.path for site in before["a"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"unit": "bytes"}, "give ranks or parameters"),
        ({"least": 0}, "need 1 <= least <= most"),
        ({"least": 3, "most": 2}, "need 1 <= least <= most"),
        ({"least": 5}, "costs 15 ranks at the sites of 'shared', above its budget of 12"),
        ({"adapters": ("vqa",)}, "no LoRA is called 'vqa'; there are shared"),
    ],
    ids=["unit", "zero", "order", "dear", "name"],
)
def test_what_cannot_be_is_refused(found: Anatomy, options: dict[str, Any], message: str) -> None:
    def plan() -> None:
        allocator = ExplainedVariance(**options)
        allocator.plan(spec, found, {site: planted(32, 2) for site in allocator.reads(spec, found)})

    spec = spec_of(4)
    with pytest.raises(ValueError, match=message):
        plan()


def test_a_mixture_without_loras_is_refused(found: Anatomy) -> None:
    spec = MixtureSpec({}, Bias(), None, Placement())
    with pytest.raises(ValueError, match="this mixture has none"):
        ExplainedVariance().reads(spec, found)
