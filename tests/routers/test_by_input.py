"""Learned routers: how each chooses, what teaches it, and that experts may be permuted, added and taken away."""

from itertools import permutations
from typing import Any

import pytest
import torch
from torch import Tensor

from moadapt import RoutingContext
from moadapt.registry import ROUTERS
from moadapt_routers import HardToSoft, MeteoRA, PromptMLP, ReMix, Scenario, Softmax, Sparsemax, Switch, TopK, TopP
from moadapt_routers.logit_router import LogitRouterSpec
from moadapt_routers.remix import ordered_log_prob
from moadapt_routers.sparsemax import sparsemax

WIDTH, EXPERTS = 6, 4
LEARNED = [pytest.param(router, id=name) for name, router in ROUTERS if issubclass(router, LogitRouterSpec)]


def seen(rows: int = 3, tokens: int = 5, **more: Any) -> RoutingContext:
    return RoutingContext(hidden=torch.randn(rows, tokens, WIDTH), **more)


def built(spec: LogitRouterSpec, experts: int = EXPERTS) -> Any:
    torch.manual_seed(0)
    router = spec.build(WIDTH, experts).eval()
    for parameter in router.parameters():
        torch.nn.init.normal_(parameter)
    return router


@pytest.mark.parametrize("spec", LEARNED)
def test_permuted_experts_give_permuted_weights(spec: type[LogitRouterSpec]) -> None:
    for scope in spec.scopes:
        router, context, order = built(spec(scope=scope)), seen(), [2, 0, 3, 1]
        before = router(context)
        router.trim(order)
        after = router(context)
        torch.testing.assert_close(after.dense(), before.dense()[..., order])
        torch.testing.assert_close(after.logits, before.logits[..., order])


@pytest.mark.parametrize("spec", LEARNED)
def test_weights_are_shares(spec: type[LogitRouterSpec]) -> None:
    for scope in spec.scopes:
        routing = built(spec(scope=scope))(seen())
        dense = routing.dense()
        assert dense.shape == (3, 5 if scope == "token" else 1, 1, EXPERTS)
        assert (dense >= 0).all()
        total = dense.sum(-1)
        assert ((total <= 1 + 1e-6) if spec is Switch else torch.isclose(total, torch.ones(()))).all()


@pytest.mark.parametrize("spec", LEARNED)
def test_what_is_not_available_gets_nothing(spec: type[LogitRouterSpec]) -> None:
    available = torch.tensor([True, False, True, False])
    for scope in spec.scopes:
        dense = built(spec(scope=scope))(seen(available=available)).dense()
        assert (dense[..., ~available] == 0).all()
        assert dense.isfinite().all()


@pytest.mark.parametrize("spec", LEARNED)
def test_experts_come_and_go(spec: type[LogitRouterSpec]) -> None:
    router, context = built(spec(scope=spec.scopes[0])), seen()
    before = router(context).logits
    router.grow(3)
    grown = router(context)
    assert grown.num_experts == EXPERTS + 3
    assert torch.equal(grown.logits[..., :EXPERTS], before)
    router.trim([5, 0, 1])
    torch.testing.assert_close(router(context).logits, grown.logits[..., [5, 0, 1]])


@pytest.mark.parametrize("training", [False, True], ids=["use", "training"])
@pytest.mark.parametrize("spec", LEARNED)
def test_one_expert_alone_is_available(spec: type[LogitRouterSpec], training: bool) -> None:
    """Also to those that choose several; weights and gradients stay finite."""
    available = torch.arange(EXPERTS) == 1
    for scope in spec.scopes:
        router = built(spec(scope=scope)).train(training)
        routing = router(seen(available=available, task_ids=torch.tensor([1, 1, 1])))
        assert (routing.dense()[..., ~available] == 0).all()
        assert routing.dense()[..., 1].max() > 0
        value = routing.weights.sum() + (0.0 if routing.log_prob is None else routing.log_prob.sum())
        if value.requires_grad:
            value.backward()
            assert all(p.grad is None or p.grad.isfinite().all() for p in router.parameters())


@pytest.mark.parametrize("width", [32, 4096])
def test_logits_begin_small_at_any_width(width: int) -> None:
    torch.manual_seed(0)
    context = RoutingContext(hidden=torch.randn(64, 4, width))
    for router in (Softmax(scope="token").build(width, 8), MeteoRA().build(width, 8), Scenario().build(width, 8)):
        assert 0 < float(router(context).logits.detach().std()) < 0.3
        router.grow(8)
        assert 0 < float(router(context).logits.detach()[..., 8:].std()) < 0.3


def nearest_on_simplex(z: Tensor) -> Tensor:
    """By trying all supports, (E,)."""
    best, found = float("inf"), z
    for size in range(1, len(z) + 1):
        for kept in {tuple(sorted(each[:size])) for each in permutations(range(len(z)))}:
            p = torch.zeros_like(z)
            p[list(kept)] = z[list(kept)] - (z[list(kept)].sum() - 1) / size
            if (p >= 0).all() and float((p - z).norm()) < best:
                best, found = float((p - z).norm()), p
    return found


def test_sparsemax_is_the_nearest_point_of_the_simplex() -> None:
    torch.manual_seed(0)
    for scale in (0.1, 1.0, 5.0):
        for z in scale * torch.randn(20, EXPERTS, dtype=torch.float64):
            torch.testing.assert_close(sparsemax(z), nearest_on_simplex(z))
    z = torch.tensor([0.3, 0.1, -2.0, 0.2], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(sparsemax, z)
    assert sparsemax(torch.tensor([1.0, -torch.inf, 0.9])).tolist() == pytest.approx([0.55, 0.0, 0.45])


def test_top_p_takes_the_fewest_that_reach_p() -> None:
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log().view(1, 1, 1, -1)
    for p, kept in ((0.4, 1), (0.5, 1), (0.51, 2), (0.8, 2), (0.9, 3), (1.0, 4)):
        weights = TopP(p=p).choose(logits, seen(), training=False).weights.flatten()
        expected = torch.tensor([0.5, 0.3, 0.15, 0.05])[:kept]
        torch.testing.assert_close(weights[:kept], expected / expected.sum())
        assert (weights[kept:] == 0).all()


def test_all_of_the_best_are_a_softmax() -> None:
    context = seen()
    torch.testing.assert_close(built(TopK(k=EXPERTS))(context).dense(), built(Softmax())(context).dense())


@pytest.mark.parametrize(("spec", "learns"), [(TopK(k=1), False), (Switch(capacity=None), True), (Softmax(), True)])
def test_one_expert_of_weight_one_teaches_nothing(spec: Any, learns: bool) -> None:
    router = built(spec)
    (router(seen()).dense() * torch.randn(3, 1, 1, EXPERTS)).sum().backward()
    assert bool((router.linear.weight.grad.abs() > 1e-7).any()) is learns


def test_an_expert_takes_its_share_of_a_row_in_order() -> None:
    """Against a count by hand; padding is not counted, and later tokens change nothing."""
    real = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1, 0, 0]]).bool()
    router = built(Switch(scope="token", capacity=1.0), experts=2).train()
    hidden = torch.randn(2, 9, WIDTH)
    routing = router(RoutingContext(hidden=hidden, real=real))
    chosen, kept = routing.indices[:, :, 0, 0], routing.weights[:, :, 0, 0] > 0
    for row in range(2):
        taken, count = [0, 0], 0
        for token in real[row].nonzero().flatten().tolist():
            expert, count = int(chosen[row, token]), count + 1
            taken[expert] += 1
            assert bool(kept[row, token]) is (taken[expert] <= -(-count // 2))
    assert not kept[real].all()
    shorter = router(RoutingContext(hidden=hidden[:, :6], real=real[:, :6]))
    assert torch.equal(shorter.weights[:, :, 0, 0] > 0, kept[:, :6])
    assert (router.eval()(RoutingContext(hidden=hidden, real=real)).weights > 0).all()


def test_temperature_and_noise_follow_the_training() -> None:
    spec = Softmax(temperature=4.0, end_temperature=1.0, noise=1.0, end_noise=0.0)
    router, context = built(spec), seen()
    plain = built(Softmax())(context).logits
    for progress, temperature in ((None, 1.0), (torch.tensor(0.0), 4.0), (torch.tensor(0.5), 2.0)):
        there = RoutingContext(hidden=context.hidden, progress=progress)
        torch.testing.assert_close(router(there).logits, plain / temperature)
        torch.testing.assert_close(router(there).weights, (plain / temperature).softmax(-1))
    router.train()
    moved = []
    for progress in (0.0, 0.5, 1.0):
        there = RoutingContext(hidden=context.hidden.repeat(200, 1, 1), progress=torch.tensor(progress))
        routing = router(there)
        noise = routing.weights.log() - routing.logits.log_softmax(-1)
        moved.append(float((noise - noise.mean(-1, keepdim=True)).detach().std()))
    assert moved[0] == pytest.approx(1.0 * 0.75**0.5, rel=0.1)  # what is left of unit noise when its mean is taken off
    assert moved[1] == pytest.approx(0.5 * 0.75**0.5, rel=0.1)
    assert moved[2] < 1e-5


def test_noise_may_begin_at_none() -> None:
    router, hidden = built(Softmax(noise=0.0, end_noise=1.0)).train(), torch.randn(3, 5, WIDTH)
    first, last = (RoutingContext(hidden=hidden, progress=torch.tensor(share)) for share in (0.0, 1.0))
    assert torch.equal(router(first).weights, router(first).weights)
    assert not torch.equal(router(last).weights, router(last).weights)


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: Softmax(end_temperature=-1.0), r"Softmax got end_temperature=-1.0; it must be above 0"),
        (lambda: Softmax(noise=-0.1), r"Softmax got noise=-0.1; it must be 0 or more"),
        (lambda: TopP(p=0.0), r"TopP got p=0.0; it must be above 0 and at most 1"),
        (lambda: Switch(capacity=0.0), r"Switch got capacity=0.0; it must be above 0, or None"),
        (lambda: PromptMLP(width=0), r"PromptMLP got width=0; it must be at least 1"),
        (lambda: PromptMLP(scope="token"), r"PromptMLP routes by sequence, not by 'token'"),
        (lambda: HardToSoft(hard=1.5), r"HardToSoft got hard=1.5; it must be from 0 to 1"),
        (lambda: Scenario(confidence=2.0), r"Scenario got confidence=2.0, width=64; confidence is from 0 to 1"),
        (lambda: ReMix(samples=1), r"ReMix got samples=1; leaving one out takes at least 2"),
        (lambda: ReMix(weight=0.0), r"ReMix got weight=0.0; it must be above 0, or None for 1/k"),
        (lambda: ReMix(k=5).build(WIDTH, EXPERTS), r"ReMix needs 5 experts or more, but there are 4"),
    ],
)
def test_settings_out_of_range_are_refused(make: Any, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        make()


def test_gates_without_bias_are_theirs() -> None:
    router = MeteoRA().build(WIDTH, EXPERTS)
    assert [name for name, _ in router.named_parameters()] == ["linear.weight"]
    assert (router.spec.scope, router.spec.per) == ("token", "site")


def test_a_scenario_that_is_not_sure_gets_no_expert() -> None:
    context = seen(rows=50)
    router = built(Scenario())
    probability = router(context).logits.softmax(-1).amax(-1).flatten()
    bound = float(probability.detach().median())
    weights = built(Scenario(confidence=bound))(context).weights.flatten()
    assert torch.equal(weights, (probability >= bound).float())


def test_the_hard_stage_goes_by_task() -> None:
    ids = torch.tensor([3, 0, 2])
    router = built(HardToSoft(k=2, hard=0.5)).train()
    early, late = (torch.tensor(share) for share in (0.4, 0.6))
    context = seen(task_ids=ids, progress=early)
    expected = torch.nn.functional.one_hot(ids, EXPERTS).float()
    assert torch.equal(router(context).dense()[:, 0, 0], expected)
    soft = built(TopK(k=2))
    for progress in (late, None):
        there = RoutingContext(hidden=context.hidden, task_ids=ids, progress=progress)
        torch.testing.assert_close(router(there).dense(), soft(there).dense())
    with pytest.raises(ValueError, match="goes by task while it is trained; pass task="):
        router(RoutingContext(hidden=context.hidden, progress=early))


def test_chances_of_all_draws_sum_to_one() -> None:
    logits = torch.randn(EXPERTS, dtype=torch.float64)
    for k in range(1, EXPERTS + 1):
        draws = torch.tensor(list(permutations(range(EXPERTS), k)))
        chances = ordered_log_prob(logits.expand(len(draws), -1), draws).exp()
        assert float(chances.sum()) == pytest.approx(1.0, abs=1e-12)


def test_draws_come_as_often_as_their_chance() -> None:
    torch.manual_seed(0)
    router, count = built(ReMix(k=2)).train(), 40_000
    hidden = torch.randn(1, 1, WIDTH).expand(count, 1, WIDTH)
    routing = router(RoutingContext(hidden=hidden))
    draws = torch.tensor(list(permutations(range(EXPERTS), 2)))
    chances = ordered_log_prob(routing.logits[0, 0, 0].expand(len(draws), -1), draws).exp()
    codes = routing.indices[:, 0, 0] @ torch.tensor([EXPERTS, 1])
    found = torch.stack([(codes == int(draw @ torch.tensor([EXPERTS, 1]))).float().mean() for draw in draws])
    torch.testing.assert_close(found, chances.detach(), rtol=0, atol=4 * 0.5 / count**0.5)
    torch.testing.assert_close(routing.log_prob, ordered_log_prob(routing.logits, routing.indices))


def test_chosen_experts_count_alike() -> None:
    weights = built(ReMix(k=3))(seen()).weights
    assert torch.equal(weights, torch.full_like(weights, 1 / 3))
    assert float(built(ReMix(k=3, weight=2.0))(seen()).dense().sum(-1).max()) == 6.0


def test_the_policy_gradient_is_unbiased() -> None:
    """Its mean over many draws is the gradient of the expected loss, counted out over all of them."""
    torch.manual_seed(0)
    logits = torch.randn(EXPERTS, dtype=torch.float64, requires_grad=True)
    draws = torch.tensor(list(permutations(range(EXPERTS), 2)))
    losses = torch.randn(len(draws), dtype=torch.float64)

    def log_chances() -> Tensor:
        return ordered_log_prob(logits.expand(len(draws), -1), draws)

    (expected,) = torch.autograd.grad((log_chances().exp() * losses).sum(), logits)
    spec, rows = ReMix(k=2, samples=3), 200_000
    picked = torch.multinomial(log_chances().exp().detach(), 3 * rows, replacement=True).view(3, rows)
    (found,) = torch.autograd.grad(spec.policy_loss(log_chances()[picked], losses[picked]), logits)
    assert float((found / rows - expected).norm() / expected.norm()) < 0.01
    (shifted,) = torch.autograd.grad(spec.policy_loss(log_chances()[picked], losses[picked] + 100.0), logits)
    torch.testing.assert_close(shifted, found, rtol=1e-6, atol=1e-6)


def test_sparsemax_router_leaves_some_out() -> None:
    weights = built(Sparsemax())(seen(rows=20)).weights
    assert (weights == 0).any()
    assert ((weights > 0).sum(-1) > 1).any()
