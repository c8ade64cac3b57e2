"""Abstaining: as many false alarms as were asked for, far rows refused, and else the other router."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from moadapt import RoutingContext, attach, fit_router, load, reroute
from moadapt.adapters import LoRA
from moadapt.fitting import Examples, Fitting
from moadapt.registry import ROUTERS
from moadapt.router import Router
from moadapt.routing import Routing
from moadapt.specs import from_json, to_json
from moadapt_routers import Abstain, Arrow, ByTask, Prototypes, Softmax, TopK
from moadapt_routers.abstain import AbstainRouter, conformal_quantile
from tests.models import llava_batch, randomize, tiny_llava

WIDTH, NAMES = 16, ("a", "b", "c")
SPECS = [
    Abstain(router=Prototypes(k=1, per="layer"), score="logit", false_alarms=0.1),
    Abstain(router=Prototypes(k=1, per="layer"), score="energy", false_alarms=0.1),
    Abstain(router=Softmax(), score="distance", false_alarms=0.1),
]


def clusters(rows: int, seed: int) -> Examples:
    """Rows about a direction of their expert's own, of zero mean and unit size a feature."""
    generator = torch.Generator().manual_seed(seed)
    experts = torch.arange(rows) % len(NAMES)
    rows_ = torch.eye(WIDTH)[experts] * 8 + torch.randn(rows, WIDTH, generator=generator)
    return Examples(torch.nn.functional.layer_norm(rows_, (WIDTH,)), experts)


def contexts(examples: Examples) -> RoutingContext:
    return RoutingContext(hidden=examples.features[:, None])


def fitted(spec: Abstain, examples: Examples) -> AbstainRouter:
    router = spec.build(WIDTH, len(NAMES))

    def route(inner: Router) -> list[Routing]:
        return [inner(contexts(examples))]

    def never() -> Any:
        raise AssertionError("no adapters are needed")

    router.fit(Fitting(NAMES, never, lambda: examples, lambda weights: 0.0, route))
    return router


def refused(router: AbstainRouter, examples: Examples) -> Tensor:
    return ~router(contexts(examples)).dense().flatten(1).any(dim=1)


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_false_alarms_are_as_many_as_were_asked_for(spec: Abstain) -> None:
    """Of rows like the calibration's the chosen share is refused, to within what so many rows can tell."""
    router = fitted(spec, clusters(1200, seed=0))
    share = float(refused(router, clusters(3000, seed=1)).float().mean())
    spread = (0.1 * 0.9 * (1 / 600 + 1 / 3000)) ** 0.5
    assert abs(share - 0.1) < 4 * spread


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_far_rows_are_refused(spec: Abstain) -> None:
    router = fitted(spec, clusters(600, seed=0))
    far = torch.zeros(30, WIDTH)
    far[:, 8:] = torch.randn(30, 8) * 3
    assert refused(router, Examples(torch.nn.functional.layer_norm(far, (WIDTH,)), torch.zeros(30))).all()


def test_rows_that_are_kept_have_the_weights_of_the_other_router() -> None:
    spec, examples = SPECS[0], clusters(600, seed=0)
    router = fitted(spec, examples)
    found, expected = router(contexts(examples)), router.inner(contexts(examples))
    kept = ~refused(router, examples)
    assert 0.7 < float(kept.float().mean()) < 1
    assert torch.equal(found.dense()[kept], expected.dense()[kept])
    assert not found.dense()[~kept].any()
    assert torch.equal(found.logits, expected.logits)


def test_what_the_other_router_is_fitted_to_is_not_calibrated_on() -> None:
    """Of each expert every second row calibrates, whatever the order of the tasks."""
    examples, seen = clusters(12, seed=0), list[Examples]()
    router = SPECS[0].build(WIDTH, len(NAMES))
    fit = router.inner.fit
    router.inner.fit = lambda fitting: (seen.append(fitting.examples), fit(fitting))  # type: ignore[assignment]
    router.fit(
        Fitting(NAMES, lambda: None, lambda: examples, lambda w: 0.0, lambda inner: [inner(contexts(examples))])  # type: ignore[arg-type, return-value]
    )
    assert torch.equal(seen[0].features, examples.features[[0, 1, 2, 6, 7, 8]])
    held_out = router.inner(contexts(examples)).logits[[3, 4, 5, 9, 10, 11], 0, 0]
    torch.testing.assert_close(router.threshold, -held_out.amax(-1).min())


def test_the_threshold_is_the_conformal_quantile() -> None:
    scores = torch.arange(1.0, 100.0)[torch.randperm(99)]  # 99 of them: the 95th of 100 gaps
    assert conformal_quantile(scores, 0.05) == 95
    assert conformal_quantile(scores[:3], 0.05) == scores[:3].max()
    with pytest.raises(ValueError, match="no example is left to calibrate on"):
        conformal_quantile(scores[:0], 0.05)


def test_a_refused_row_gets_the_shared_adapter_alone(tmp_path: Path) -> None:
    experts = {name: LoRA(rank=2) for name in NAMES}
    mixture = attach(tiny_llava(), shared=LoRA(), experts=experts, router=Softmax(per="model"))
    randomize(mixture)
    before = [parameter.clone() for parameter in mixture.routers.parameters()]
    mixture = reroute(mixture, Abstain(router=Softmax(per="model"), score="distance")).eval()
    assert all(torch.equal(*pair) for pair in zip(before, mixture.routers.parameters(), strict=True))
    batch = llava_batch()
    with pytest.raises(ValueError, match="AbstainRouter was not fitted"):
        mixture(**batch)
    fit_router(mixture, [{**llava_batch(seed=seed), "task": list(NAMES)} for seed in (5, 6)])
    (router,) = mixture.routers
    router.threshold.fill_(-1.0)
    with torch.no_grad():
        found = mixture(**batch).logits
        with mixture.override({}):
            assert torch.equal(found, mixture(**batch).logits)
        router.threshold.fill_(2.0)
        kept = mixture(**batch).logits
        assert (kept - found).abs().max() > 1e-2
        mixture.save(tmp_path / "saved")
        assert torch.equal(load(tmp_path / "saved", tiny_llava()).eval()(**batch).logits, kept)


def test_the_other_router_is_read_from_a_file() -> None:
    spec = Abstain(router=TopK(k=1, per="tower"), score="logit")
    stored = to_json(spec, ROUTERS)
    assert stored["router"] == to_json(TopK(k=1, per="tower"), ROUTERS)
    assert from_json(stored, ROUTERS) == spec
    assert from_json({"name": "abstain", "router": "prototypes"}, ROUTERS) == Abstain(router=Prototypes())
    assert Abstain(per="site") == Abstain(router=Softmax(per="site"))
    assert Abstain(router=Prototypes()).reads == "prompt"
    with pytest.raises(ValueError, match="no router is called 'prototype'"):
        from_json({"name": "abstain", "router": "prototype"}, ROUTERS)
    with pytest.raises(ValueError, match="Abstain got router=3; give RouterSpec or null"):
        from_json({"name": "abstain", "router": 3}, ROUTERS)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"router": ByTask()},
            r"Abstain got router=ByTask\(.*; give a router that reads its input",
        ),
        ({"router": Arrow()}, r"Abstain got router=Arrow\("),
        ({"router": Softmax(scope="token")}, "routes by sequence"),
        ({"score": "odd"}, "score='odd', false_alarms=0.05; score is energy, logit or distance"),
        ({"false_alarms": 1.0}, "false_alarms above 0 and below 1"),
    ],
)
def test_what_cannot_be_judged_is_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Abstain(**given)


def test_growing_and_trimming_ask_for_a_new_calibration() -> None:
    router = fitted(replace(SPECS[0], score="distance"), clusters(60, seed=0))
    router.trim([0, 2])
    assert not router.fitted
    assert router.inner.means.shape == (2, WIDTH)
