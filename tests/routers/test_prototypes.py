"""Retrieval by prototypes: separable features are told apart, layer by layer, and nothing else is claimed."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from moadapt import RoutingContext, attach, fit_router
from moadapt.adapters import LoRA
from moadapt.adapters.delta import Factors
from moadapt.fitting import Examples, Fitting
from moadapt_routers import Prototypes
from moadapt_routers.prototypes import PrototypeRouter
from tests.models import llava_batch, randomize, rows_of, tiny_llava

WIDTH, NAMES = 32, ("a", "b", "c")


def clusters(rows: int, noise: float, seed: int = 0) -> Examples:
    """Rows about a direction of their expert's own."""
    generator = torch.Generator().manual_seed(seed)
    experts = torch.arange(rows) % len(NAMES)
    own = torch.eye(WIDTH)[experts] * 4
    return Examples(own + noise * torch.randn(rows, WIDTH, generator=generator), experts)


def fitted(examples: Examples, spec: Prototypes | None = None) -> PrototypeRouter:
    router = (spec or Prototypes()).build(WIDTH, len(NAMES))

    def never() -> Factors:
        raise AssertionError("it looks at examples alone")

    router.fit(Fitting(NAMES, never, lambda: examples, lambda weights: 0.0, lambda router: []))
    return router


def routed(router: PrototypeRouter, features: Tensor) -> Tensor:
    return router(RoutingContext(hidden=features[:, None])).dense()[:, 0, 0]


def test_separable_rows_go_to_their_expert() -> None:
    router, new = fitted(clusters(12, noise=0.5)), clusters(300, noise=0.5, seed=1)
    weights = routed(router, new.features)
    assert (weights.argmax(-1) == new.experts).float().mean() > 0.98
    assert weights.max(-1).values.mean() > 0.9


def test_logits_are_cosines_with_the_mean_of_each_experts_rows() -> None:
    examples, x = clusters(30, noise=1.0), torch.randn(5, WIDTH)
    router = fitted(examples, Prototypes(k=3, temperature=0.1))
    routing = router(RoutingContext(hidden=x[:, None]))
    means = torch.stack([examples.features[examples.experts == e].mean(0) for e in range(3)])
    pooled = functional.layer_norm(x, (WIDTH,))
    expected = functional.cosine_similarity(pooled[:, None], means[None], dim=-1) / 0.1
    assert routing.logits is not None
    torch.testing.assert_close(routing.logits[:, 0, 0], expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(routing.dense()[:, 0, 0], expected.softmax(-1), rtol=1e-4, atol=1e-4)


def test_rows_of_no_expert_are_left_out() -> None:
    examples = clusters(12, noise=0.5)
    strays = Examples(
        torch.cat([examples.features, torch.full((4, WIDTH), 9.0)]), torch.cat([examples.experts, torch.full((4,), -1)])
    )
    torch.testing.assert_close(fitted(strays).means, fitted(examples).means)


def test_every_place_retrieves_the_rows_it_was_fitted_to() -> None:
    mixture = attach(tiny_llava(), experts={name: LoRA() for name in NAMES}, router=Prototypes(k=1, per="layer"))
    randomize(mixture)
    batch = llava_batch()
    halves = [{**rows_of(batch, 0), "task": "a"}, {**rows_of(batch, 1, 2), "task": ["b", "c"]}]
    fit_router(mixture, halves)
    with torch.no_grad(), mixture.trace() as trace:
        mixture(**batch)
    assert len(trace.routings) == 3
    for weights in trace.routings.values():
        assert torch.equal(weights[0][:, 0, 0], torch.eye(3))


def test_a_place_is_fitted_on_what_reaches_it_in_use() -> None:
    """The second block's prototypes are the features that it sees when the first one routes as fitted."""
    mixture = attach(tiny_llava(), experts={name: LoRA() for name in NAMES}, router=Prototypes(k=2, per="layer"))
    randomize(mixture)
    mixture.train()
    fit_router(mixture, {**llava_batch(), "task": list(NAMES)})
    assert mixture.training
    mixture.eval()
    with torch.no_grad(), mixture.observe() as found:
        mixture(**llava_batch())
    for observed, router in zip(found, mixture.routers, strict=True):
        expected = functional.normalize(observed.seen.pooled, dim=-1)
        torch.testing.assert_close(router.means, expected, rtol=1e-4, atol=1e-4)


def test_examples_that_lack_an_expert_or_a_task_are_refused() -> None:
    mixture = attach(tiny_llava(), experts={name: LoRA() for name in NAMES}, router=Prototypes())
    with pytest.raises(ValueError, match="no example of c; give batches with `task` and rows of every expert"):
        fit_router(mixture, {**llava_batch(), "task": ["a", "b", "b"]})
    with pytest.raises(ValueError, match="no example of a, b, c"):
        fit_router(mixture, llava_batch())
    with pytest.raises(ValueError, match="Prototypes is fitted from examples; give batches"):
        fit_router(mixture)
    with pytest.raises(ValueError, match="was not fitted to these adapters"):
        mixture(**llava_batch())


def test_trimmed_prototypes_are_those_of_the_experts_that_are_left() -> None:
    router = fitted(clusters(12, noise=0.5))
    before = router.means.clone()
    router.trim([2, 0])
    assert torch.equal(router.means, before[[2, 0]])
    router.grow(1)
    assert not router.fitted
