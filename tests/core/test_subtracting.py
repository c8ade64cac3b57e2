"""What adapters have in common, taken out of each: exact on weight changes, against dense matrices."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from moadapt import Mixture, Placement, attach, load, subtract_general
from moadapt.adapters import Bias, LoRA
from moadapt_routers import ByTask
from tests.models import randomize, tiny_llava

UPPER = Placement(depth=(1 / 3, 1.0), kinds=("attention",))


def ragged() -> Mixture:
    """Three LoRAs of different ranks, scales, starts and sites, and a shared one, in float64."""
    experts = {
        "ask": LoRA(rank=2, alpha=5.0),
        "tell": LoRA(rank=3, init="pissa"),
        "find": LoRA(rank=4, rank_stabilized=True, placement=UPPER),
    }
    mixture = attach(tiny_llava(), shared=LoRA(rank=1), experts=experts, router=ByTask())
    randomize(mixture)
    return mixture.double()


def changes(mixture: Mixture) -> dict[tuple[str, str], Tensor]:
    """The dense weight change of every adapter at every site where it sits."""
    found: dict[tuple[str, str], Tensor] = {}
    for site, bank in mixture.banks():
        with torch.no_grad():
            nothing = bank.delta(torch.zeros(len(mixture.experts))).weight()
            for index, name in enumerate(mixture.experts):
                if name in bank.names:
                    only = torch.eye(len(mixture.experts))[index]
                    found[name, site.path] = bank.delta(only).weight() - nothing
            if "shared" in bank.names:
                found["shared", site.path] = nothing
    return found


def assert_equal(found: Tensor, expected: Tensor) -> None:
    assert (found - expected).norm() <= 1e-12 * expected.norm()


@pytest.mark.parametrize("general", [None, "find", "shared"])
def test_changes_equal_dense_differences(general: str | None) -> None:
    mixture = ragged()
    before, experts, sites = changes(mixture), mixture.experts, [site.path for site in mixture.sites]
    after = changes(subtract_general(mixture, general).double())
    zero = torch.zeros(())
    for path in sites:
        own = {name: before.get((name, path), zero) for name in (*experts, "shared")}
        common = sum(own[name] for name in experts) / 3 if general is None else own[general]
        for name in experts:
            if name != general:
                assert_equal(after.get((name, path), zero), own[name] - common)
        assert_equal(after["shared", path], own["shared"])
    assert not [name for name, _ in after if name == general and general != "shared"]


def test_the_basis_of_an_adapters_factors_does_not_matter() -> None:
    """Means of the factors, instead of the products', would change with it."""
    mixture = ragged()
    expected = changes(subtract_general(mixture))
    turned, turn = ragged(), torch.tensor([[0.0, 2.0], [-0.5, 1.0]]).double()
    for _, bank in turned.banks():
        if "ask" in bank.names:
            own = bank.state("ask")
            bank.load_state("ask", {"down": turn @ own["down"], "up": torch.linalg.inv(turn).T @ own["up"]})
    for key, change in changes(subtract_general(turned)).items():
        assert_equal(change, expected[key])


def test_the_new_mixture_is_saved_and_loaded(tmp_path: Path) -> None:
    mixture = ragged().float()
    mixture.freeze("ask")
    mixture.freeze("shared")
    found = subtract_general(mixture)
    assert found.frozen == ("shared", "ask")
    found.save(tmp_path / "saved")
    loaded = changes(load(tmp_path / "saved", tiny_llava()))
    assert all(torch.equal(loaded[key], change) for key, change in changes(found).items())


def test_ranks_grow_by_those_of_what_is_subtracted() -> None:
    found = subtract_general(ragged())
    path = "model.language_model.layers.0.self_attn.q_proj"
    top = "model.language_model.layers.2.self_attn.q_proj"
    assert {found.spec.experts[name].ranks[path] for name in found.experts} == {2 + 2 * 3}  # type: ignore[attr-defined]
    assert {found.spec.experts[name].ranks[top] for name in found.experts} == {2 + 2 * 3 + 4}  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("experts", "general", "message"),
    [
        ({"a": LoRA(), "b": LoRA()}, "c", "no adapter 'c' to subtract; this mixture has a, b"),
        ({"a": LoRA()}, None, "leaves nothing; give more experts"),
        ({"a": LoRA()}, "a", "leaves nothing; give more experts"),
        ({"a": LoRA(), "b": Bias()}, None, "b of family Bias is no low-rank change of the weight alone"),
    ],
)
def test_what_cannot_be_subtracted_is_refused(experts: Any, general: str | None, message: str) -> None:
    mixture = attach(tiny_llava(), experts=experts, router=ByTask())
    with pytest.raises(ValueError, match=message):
        subtract_general(mixture, general)
    assert mixture.attached
