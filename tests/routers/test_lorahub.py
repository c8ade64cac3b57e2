"""Searched weights: a planted mixing is found, and the loss that is searched is that of exact mixing."""

import builtins
from typing import Any

import pytest
import torch
from torch import Tensor

from moadapt import attach, fit_router
from moadapt.adapters import LoRA
from moadapt_routers import Constant, LoRAHub
from tests.models import llava_batch, randomize, tiny_llava


def test_a_planted_mixing_is_found_on_a_quadratic() -> None:
    pytest.importorskip("nevergrad")
    planted = torch.tensor([0.8, -0.4, 0.0, 1.2])
    for seed in range(3):
        found = LoRAHub(penalty=0.0, steps=60, seed=seed).search(lambda w: float((w - planted).square().sum()), 4)
        assert (found - planted).abs().max() < 0.05


def test_weights_stay_within_the_bound_and_the_penalty_draws_them_to_zero() -> None:
    pytest.importorskip("nevergrad")
    seen: list[Tensor] = []

    def loss(weights: Tensor) -> float:
        seen.append(weights)
        return float((weights - 5).square().sum())

    found = LoRAHub().search(loss, 3)
    assert len(seen) == 40
    assert torch.stack(seen).abs().max() <= 1.5
    assert found.min() > 1.4
    drawn = LoRAHub(penalty=30.0, steps=60).search(lambda w: float((w - 1).square().sum()), 3)
    assert drawn.abs().max() < 0.05


def test_the_same_seed_finds_the_same() -> None:
    pytest.importorskip("nevergrad")
    first, again = (LoRAHub(seed=4).search(lambda w: float(w.sin().sum()), 3) for _ in range(2))
    assert torch.equal(first, again)


def test_what_is_searched_is_the_loss_of_exact_mixing() -> None:
    pytest.importorskip("nevergrad")
    mixture = attach(tiny_llava(), experts={"a": LoRA(rank=2), "b": LoRA(rank=5)}, router=LoRAHub(steps=12))
    randomize(mixture, scale=0.1)
    batch = llava_batch()
    fit_router(mixture, batch)
    (router,) = mixture.routers
    with torch.no_grad():
        loss = float(mixture(**batch).loss)
        with mixture.override({}):
            unmixed = float(mixture(**batch).loss)
    found = tuple(router.weights.tolist())
    assert loss + 0.05 * sum(map(abs, found)) / 2 <= unmixed + 1e-6  # no weights at all are among those tried
    base = mixture.detach()
    again = attach(base, experts={"a": LoRA(rank=2), "b": LoRA(rank=5)}, router=Constant(weights=found))
    randomize(again, scale=0.1)
    with torch.no_grad():
        assert float(again(**batch).loss) == pytest.approx(loss, rel=1e-6)


def test_examples_without_answers_are_refused() -> None:
    pytest.importorskip("nevergrad")
    mixture = attach(tiny_llava(), experts={"a": LoRA()}, router=LoRAHub())
    batch = llava_batch()
    del batch["labels"]
    with pytest.raises(ValueError, match="needs their answers; give batches with labels"):
        fit_router(mixture, batch)


def test_a_missing_nevergrad_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    load = builtins.__import__

    def without(name: str, *args: Any) -> Any:
        if name == "nevergrad":
            raise ModuleNotFoundError(name)
        return load(name, *args)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ValueError, match=r"searches with nevergrad; run `pip install moadapt\[search\]`"):
        LoRAHub().search(lambda weights: 0.0, 2)


@pytest.mark.parametrize("given", [{"steps": 0}, {"bound": 0.0}, {"penalty": -1.0}, {"seed": -1}], ids=str)
def test_settings_out_of_range_are_refused(given: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="steps is at least 1, the bound above 0, penalty and seed 0 or more"):
        LoRAHub(**given)
