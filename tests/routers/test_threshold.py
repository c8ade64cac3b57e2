"""Experts above a learned threshold, taught by what they are worth."""

from typing import Any

import pytest
import torch
from torch import Tensor

from moadapt import RoutingContext
from moadapt.objectives import UtilityRanking
from moadapt.routed import routed_at
from moadapt.tracing import Observation
from moadapt_routers import Threshold
from moadapt_routers.logit_router import LogitRouter
from moadapt_routers.threshold import ThresholdMap

NAMES = ("a", "b", "c", "d")


def router(**options: Any) -> LogitRouter:
    torch.manual_seed(0)
    built = Threshold(**options).build(8, 4)
    torch.nn.init.normal_(built.linear.weight)
    return built


def context(rows: int = 6, seed: int = 1, **more: Any) -> RoutingContext:
    return RoutingContext(hidden=torch.randn(rows, 3, 8, generator=torch.Generator().manual_seed(seed)), **more)


def test_weights_are_shares_above_the_threshold() -> None:
    built, seen = router(threshold=0.25), context()
    found = built(seen).weights[:, 0, 0]
    scores = seen.pooled @ built.linear.weight.T
    kept = [[max(0.0, float(score.detach()) - 0.25) for score in row] for row in scores]
    expected = torch.tensor([[value / max(sum(row), 1.0) for value in row] for row in kept])
    torch.testing.assert_close(found, expected)
    assert bool((found == 0).any())
    assert bool((found > 0).any())


@pytest.mark.parametrize("far", [1e3, float("inf")])
def test_a_bar_far_off_keeps_all_or_leaves_the_base(far: float) -> None:
    built = router()
    assert isinstance(built.linear, ThresholdMap)
    with torch.no_grad():
        built.linear.threshold.fill_(-far)
        torch.testing.assert_close(built(context()).weights, torch.full((6, 1, 1, 4), 0.25), rtol=0.02, atol=0)
        built.linear.threshold.fill_(far)
    routing = built(context())
    assert not routing.weights.any()
    routing.weights.sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in built.parameters())


def test_the_threshold_is_learned_and_unavailable_experts_get_nothing() -> None:
    built = router()
    (built(context()).weights ** 2).sum().backward()
    assert isinstance(built.linear, ThresholdMap)
    assert built.linear.threshold.grad is not None
    assert built.linear.threshold.grad != 0
    weights = built(context(available=torch.tensor([True, False, True, False]))).weights
    assert not weights[..., [1, 3]].any()
    assert weights.isfinite().all()


def test_growing_and_trimming_keep_the_threshold() -> None:
    built, seen = router(threshold=-0.5), context()
    scores = built(seen).logits
    built.grow(1)
    assert scores is not None
    torch.testing.assert_close(built(seen).logits[..., :4], scores)
    built.trim([3, 1])
    torch.testing.assert_close(built(seen).logits, scores[..., [3, 1]])


def test_a_threshold_that_is_no_number_is_refused() -> None:
    with pytest.raises(ValueError, match="it must be finite"):
        Threshold(threshold=float("nan"))
    with pytest.raises(ValueError, match="UtilityRanking got temperature=0"):
        UtilityRanking(temperature=0)


def distance(routing: Any, seen: RoutingContext, utilities: Tensor, **options: Any) -> Tensor:
    objective = UtilityRanking(**options)
    routed = routed_at(Observation("here", routing, seen), NAMES, NAMES, utilities)
    return objective.value(objective.sums(routed), routed)


def test_the_ranking_loss_is_a_divergence_and_0_where_order_and_gaps_agree() -> None:
    built, seen = router(), context()
    routing = built(seen)
    scores = routing.logits[:, 0, 0].detach()
    assert distance(routing, seen, scores + 7.0).abs() < 1e-6  # gaps alone count
    utilities = torch.randn(6, 4)
    wanted, found = (utilities / 0.5).softmax(-1), (scores / 0.5).softmax(-1)
    expected = torch.stack([(p * (p / q).log()).sum() for p, q in zip(wanted, found, strict=True)]).mean()
    torch.testing.assert_close(distance(routing, seen, utilities, temperature=0.5).detach(), expected)


def test_planted_utilities_are_recovered() -> None:
    torch.manual_seed(0)
    built, planted = Threshold().build(8, 4), torch.randn(4, 8)
    seen, held_out = context(rows=64), context(rows=32, seed=2)
    optimizer = torch.optim.Adam(built.parameters(), lr=0.05)
    for _ in range(200):
        optimizer.zero_grad()
        distance(built(seen), seen, seen.pooled @ planted.T).backward()
        optimizer.step()
    scores, utilities = built(held_out).logits[:, 0, 0].detach(), held_out.pooled @ planted.T
    ranks = [each.argsort(dim=1).argsort(dim=1).float() for each in (scores, utilities)]
    spearman = torch.stack([torch.corrcoef(torch.stack(pair))[0, 1] for pair in zip(*ranks, strict=True)])
    assert spearman.mean() > 0.9


def test_utilities_of_other_rows_are_refused() -> None:
    built, seen = router(), context()
    with pytest.raises(ValueError, match="utilities are those of 5 rows, but the routing at here has 6"):
        distance(built(seen), seen, torch.randn(5, 4))
