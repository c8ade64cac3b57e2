"""Arrow and spectral routing: against dense decompositions, on planted experts, and what must not matter to them."""

from typing import Any

import pytest
import torch
from torch import Tensor

from moadapt import Placement, RoutingContext, attach, fit_router
from moadapt.adapters import Bias, LoRA
from moadapt.adapters.delta import Factors
from moadapt.fitting import Fitting
from moadapt_routers import Arrow, ByTask, Spectral
from moadapt_routers.direction_router import DirectionRouter, DirectionRouterSpec, singular_directions
from tests.models import llava_batch, randomize, tiny_llava

IN, OUT, NAMES = 24, 18, ("a", "b", "c", "d")
RANKS = {"a": 1, "b": 3, "c": 5, "d": 8}
BOTH = [Arrow(), Spectral()]


def adapters(ranks: dict[str, int] = RANKS) -> dict[str, tuple[Tensor, Tensor]]:
    """Random factors, `down (R, D)` and `up (R, F)`, by name."""
    torch.manual_seed(3)
    return {name: (torch.randn(rank, IN).double(), torch.randn(rank, OUT).double()) for name, rank in ranks.items()}


def fitted(spec: DirectionRouterSpec, given: dict[str, tuple[Tensor, Tensor]]) -> DirectionRouter:
    """A router fitted to these adapters, their ranks in one stack."""

    def factors() -> Factors:
        owners = tuple(name for name, (down, _) in given.items() for _ in down)
        return Factors(owners, *(torch.cat([pair[side] for pair in given.values()]) for side in (0, 1)))

    def never() -> Any:
        raise AssertionError("it looks at adapters alone")

    router = spec.build(IN, len(NAMES))
    router.fit(Fitting(NAMES, factors, never, lambda weights: never(), lambda router: never()))
    return router


def dense(spec: DirectionRouterSpec, given: dict[str, tuple[Tensor, Tensor]], x: Tensor) -> Tensor:
    """The scores as the papers write them, from whole weight changes, (B, T, E)."""
    x = x / x.square().mean(-1, keepdim=True).sqrt()
    scores = []
    for name in NAMES:
        down, up = given[name]
        change = up.T @ down
        if isinstance(spec, Arrow):
            scores.append((x @ torch.linalg.svd(change).Vh[0]).abs())
        else:
            scores.append((x @ change.T).norm(dim=-1))
    return torch.stack(scores, dim=-1)


def test_directions_equal_those_of_the_dense_decomposition() -> None:
    for down, up in adapters().values():
        values, vectors = singular_directions(down, up)
        _, expected, right = torch.linalg.svd(up.T @ down)
        torch.testing.assert_close(values, expected[: len(down)])
        turned = (vectors * right[: len(down)]).sum(-1, keepdim=True).sign() * vectors  # vectors have no sign
        torch.testing.assert_close(turned, right[: len(down)], rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("spec", BOTH, ids=str)
def test_scores_equal_those_of_whole_weight_changes(spec: DirectionRouterSpec) -> None:
    given, x = adapters(), torch.randn(2, 7, IN).double()
    torch.testing.assert_close(fitted(spec, given).scores(x), dense(spec, given, x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("spec", BOTH, ids=str)
def test_inputs_along_an_experts_direction_find_it(spec: DirectionRouterSpec) -> None:
    """Experts read directions of their own, so the others do not see these inputs."""
    basis = torch.linalg.qr(torch.randn(IN, IN).double())[0]
    given = {n: (basis[[i, 4 + i]] * torch.tensor([[1.0], [0.1]]), torch.randn(2, OUT)) for i, n in enumerate(NAMES)}
    given = {name: (down.double(), up.double()) for name, (down, up) in given.items()}
    found = [singular_directions(*given[name])[1][0] for name in NAMES]
    x = torch.stack([each * (-3.0) ** i for i, each in enumerate(found)])[None]  # of any size, and on either side
    routing = fitted(spec, given)(RoutingContext(hidden=x))
    assert routing.indices is not None
    assert routing.indices[0, :, 0, 0].tolist() == [0, 1, 2, 3]
    assert (routing.dense()[0, :, 0].diagonal() > 0.8).all()


def test_sizes_and_bases_of_factors_do_not_matter_to_arrow() -> None:
    given, x = adapters(), torch.randn(2, 7, IN).double()
    expected = fitted(Arrow(), given).scores(x)
    changed = {}
    for index, (name, (down, up)) in enumerate(given.items()):
        turn = torch.randn(len(down), len(down)).double() + 2 * torch.eye(len(down)).double()
        changed[name] = (turn @ down) * 10.0**index, torch.linalg.inv(turn).T @ up
    torch.testing.assert_close(fitted(Arrow(), changed).scores(x), expected, rtol=1e-4, atol=1e-5)


def test_bases_of_factors_do_not_matter_to_spectral_routing_but_sizes_do() -> None:
    given, x = adapters(), torch.randn(2, 7, IN).double()
    expected = fitted(Spectral(), given).scores(x)
    turn = {name: torch.randn(len(down), len(down)).double() for name, (down, _) in given.items()}
    turned = {n: (turn[n] @ down, torch.linalg.inv(turn[n]).T @ up) for n, (down, up) in given.items()}
    torch.testing.assert_close(fitted(Spectral(), turned).scores(x), expected, rtol=1e-4, atol=1e-4)
    larger = {name: (down, 3 * up) for name, (down, up) in given.items()}
    torch.testing.assert_close(fitted(Spectral(), larger).scores(x), 3 * expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("spec", BOTH, ids=str)
def test_signs_of_inputs_do_not_matter(spec: DirectionRouterSpec) -> None:
    router, x = fitted(spec, adapters()), torch.randn(2, 7, IN)
    assert torch.equal(router.scores(x), router.scores(-x))


@pytest.mark.parametrize("spec", [Arrow(k=3), Spectral(k=3)], ids=str)
def test_weights_are_a_softmax_over_the_k_best(spec: DirectionRouterSpec) -> None:
    router, x = fitted(spec, adapters()), torch.randn(2, 7, IN)
    routing, scores = router(RoutingContext(hidden=x)), router.scores(x)
    kept = scores >= scores.topk(3, dim=-1).values[..., -1:]
    expected = scores.masked_fill(~kept, float("-inf")).softmax(-1)
    torch.testing.assert_close(routing.dense()[:, :, 0], expected)
    torch.testing.assert_close(routing.logits, scores.unsqueeze(2))


@pytest.mark.parametrize("spec", [Arrow(k=3), Spectral(k=3)], ids=str)
def test_absent_and_unavailable_experts_are_never_chosen(spec: DirectionRouterSpec) -> None:
    router, x = fitted(spec, adapters({"b": 3, "d": 8})), torch.randn(2, 7, IN)
    weights = router(RoutingContext(hidden=x)).dense()
    assert not weights[..., [0, 2]].any()
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 7, 1))
    only = router(RoutingContext(hidden=x, available=torch.tensor([True, False, False, True]))).dense()
    assert torch.equal(only, torch.tensor([0.0, 0.0, 0.0, 1.0]).expand(2, 7, 1, 4))
    none = router(RoutingContext(hidden=x, available=torch.tensor([True, False, True, False]))).dense()
    assert not none.any()


@pytest.mark.parametrize("spec", BOTH, ids=str)
def test_an_expert_that_changes_nothing_comes_last_and_gives_no_bad_gradient(spec: DirectionRouterSpec) -> None:
    given = adapters()
    given["a"] = (given["a"][0], torch.zeros_like(given["a"][1]))
    router, x = fitted(spec, given), torch.randn(2, 7, IN, requires_grad=True)
    routing = router(RoutingContext(hidden=x))
    assert not routing.dense()[..., 0].any()
    assert routing.logits is not None
    routing.logits.sum().backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("spec", BOTH, ids=str)
def test_experts_in_another_order_get_the_same_weights(spec: DirectionRouterSpec) -> None:
    router, x = fitted(spec, adapters()), torch.randn(2, 7, IN)
    expected = router(RoutingContext(hidden=x)).dense()
    order = [2, 0, 3, 1]
    router.trim(order)
    torch.testing.assert_close(router(RoutingContext(hidden=x)).dense(), expected[..., order])
    router.trim([0, 2])
    torch.testing.assert_close(router.scores(x), fitted(spec, adapters()).scores(x)[..., [2, 3]])
    with pytest.raises(ValueError, match="gives an input 2 experts, but there are 1"):
        router.trim([0])


def test_a_router_that_grew_must_be_fitted_again() -> None:
    router = fitted(Arrow(), adapters())
    router.grow(1)
    with pytest.raises(ValueError, match=r"DirectionRouter was not fitted .* call moadapt\.fit_router"):
        router(RoutingContext(hidden=torch.randn(1, 2, IN)))


def test_no_tensor_has_an_expert_axis_beside_a_feature_axis() -> None:
    """Sizes are primes, so that a product of them tells whose axes a tensor has."""
    sizes: list[int] = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            found = func(*args, **(kwargs or {}))
            every = found if isinstance(found, tuple) else (found,)
            sizes.extend(each.numel() for each in every if torch.is_tensor(each))
            return found

    router, tokens = fitted(Spectral(), adapters()), 101
    with torch.no_grad(), Watch():
        router(RoutingContext(hidden=torch.randn(1, tokens, IN)))
    assert max(sizes) <= tokens * max(IN, sum(RANKS.values()))


def test_ragged_targets_and_families_of_a_mixture() -> None:
    upper = Placement(depth=(1 / 3, 1.0))
    experts = {"ask": LoRA(rank=2), "tell": LoRA(rank=5, lr_ratio=4.0), "find": LoRA(rank=3, placement=upper)}
    mixture = attach(tiny_llava(), shared=LoRA(), experts=experts, router=Arrow(k=2))
    randomize(mixture)
    with pytest.raises(ValueError, match="was not fitted to these adapters"):
        mixture(**llava_batch())
    fit_router(mixture)
    assert all(len(place.sites) == 1 for place in mixture.places)
    with torch.no_grad(), mixture.observe() as found:
        mixture(**llava_batch())
    by_place = {each.place: each.routing.dense() for each in found}
    assert not by_place["model.language_model.layers.0.mlp.up_proj"][..., 2].any()
    assert by_place["model.language_model.layers.1.mlp.up_proj"][..., 2].any()


def test_what_arrow_cannot_route_is_refused() -> None:
    mixture = attach(tiny_llava(), experts={"ask": LoRA(), "tell": Bias()}, router=Arrow())
    with pytest.raises(ValueError, match=r"tell of family Bias have no low-rank form .* such as prototypes"):
        fit_router(mixture)
    with pytest.raises(ValueError, match=r"Arrow decides at each site, .* and not once a layer; leave per out"):
        Arrow(per="layer")
    with pytest.raises(ValueError, match="Arrow routes by token, not by 'sequence'"):
        Arrow(scope="sequence")
    with pytest.raises(ValueError, match=r"Arrow got k=0, temperature=1\.0; k is at least 1"):
        Arrow(k=0)
    with pytest.raises(ValueError, match="Arrow gives an input 2 experts, but there are 1; choose a smaller k"):
        attach(tiny_llava(), experts={"ask": LoRA()}, router=Arrow())
    with pytest.raises(ValueError, match="ByTask has nothing to fit; train it, or"):
        fit_router(attach(tiny_llava(), experts={"ask": LoRA()}, router=ByTask()))
