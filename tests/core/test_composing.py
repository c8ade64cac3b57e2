"""Mixtures of adapters that were trained apart, and other routers for the adapters of a mixture."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from moadapt import Mixture, Placement, attach, compose, load, reroute
from moadapt.adapters import Bias, FamilySpec, LoRA
from moadapt_routers import ByTask, Constant, Softmax, TopK
from tests.models import llava_batch, randomize, tiny_llama, tiny_llava

UPPER = Placement(towers=("vision", "language"), kinds=("mlp",), depth=(1 / 3, 1.0))
SPECS: dict[str, FamilySpec] = {
    "ask": LoRA(rank=2, alpha=5.0),
    "tell": LoRA(rank=5, rank_stabilized=True, placement=UPPER),
    "find": LoRA(rank=3, init="pissa"),
    "name": Bias(),
}
"""Adapters that differ in rank, scale, sites, start and family."""


def alone(spec: FamilySpec, *, expert: bool, placement: Placement | None = None) -> Mixture:
    """A mixture of one adapter, as its owner trained it."""
    given: dict[str, Any] = {"experts": {"mine": spec}, "router": Constant()} if expert else {"shared": spec}
    mixture = attach(tiny_llava(), placement=placement, **given)
    randomize(mixture)
    return mixture.eval()


def logits(mixture: Mixture, **how: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = mixture(**llava_batch(), **how).logits
    return found


def tensors_of(mixture: Mixture, name: str) -> dict[tuple[str, str], Tensor]:
    """Every tensor of one adapter, by site and part."""
    return {
        (site.path, part): tensor
        for site, bank in mixture.banks()
        if name in bank.names
        for part, tensor in bank.state(name).items()
    }


def assert_same_tensors(found: dict[Any, Tensor], expected: dict[Any, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        assert found[key].dtype == tensor.dtype, key
        assert torch.equal(found[key], tensor), key


@pytest.fixture
def saved(tmp_path: Path) -> dict[str, Path]:
    """Folders of mixtures of one adapter each."""
    for index, (name, spec) in enumerate(SPECS.items()):
        alone(spec, expert=index % 2 == 0).save(tmp_path / name)
    return {name: tmp_path / name for name in SPECS}


def test_composed_adapters_have_the_bits_ranks_and_sites_that_they_had(saved: dict[str, Path]) -> None:
    mixture = compose(tiny_llava(), saved, router=ByTask()).eval()
    assert mixture.experts == tuple(SPECS)
    for index, (name, spec) in enumerate(SPECS.items()):
        one = alone(spec, expert=index % 2 == 0)
        assert_same_tensors(tensors_of(mixture, name), tensors_of(one, "mine" if index % 2 == 0 else "shared"))
        torch.testing.assert_close(logits(mixture, task=name), logits(one), rtol=1e-5, atol=1e-5)


def test_a_composed_mixture_is_saved_and_loaded(saved: dict[str, Path], tmp_path: Path) -> None:
    mixture = compose(tiny_llava(), saved, router=TopK(k=3), shared=saved["ask"]).eval()
    mixture.save(tmp_path / "composed")
    loaded = load(tmp_path / "composed", tiny_llava()).eval()
    assert loaded.spec == mixture.spec
    assert torch.equal(logits(loaded), logits(mixture))


def test_the_placement_of_the_owner_counts_and_not_that_of_the_new_mixture(tmp_path: Path) -> None:
    one = alone(LoRA(rank=2), expert=False, placement=UPPER)
    one.save(tmp_path / "mine")
    mixture = compose(tiny_llava(), {"ask": tmp_path / "mine"}, router=Softmax())
    assert [site.path for site in mixture.sites] == [site.path for site in one.sites]


def test_one_of_several_adapters_is_named_behind_a_colon(tmp_path: Path) -> None:
    several = attach(tiny_llava(), shared=LoRA(rank=1), experts={"a": LoRA(rank=2), "b": LoRA(rank=3)}, router=ByTask())
    randomize(several)
    several.save(tmp_path / "se:veral")
    folder = str(tmp_path / "se:veral")
    mixture = compose(
        tiny_llava(), {"b2": f"{folder}:b", "s": f"{folder}:shared"}, router=ByTask(), shared=f"{folder}:a"
    )
    for new, old in (("b2", "b"), ("s", "shared"), ("shared", "a")):
        assert_same_tensors(tensors_of(mixture, new), tensors_of(several, old))
    with pytest.raises(ValueError, match=r"holds 3 adapters; name the one to take: .*veral:shared, .*veral:a, "):
        compose(tiny_llava(), {"a": folder}, router=ByTask())
    with pytest.raises(ValueError, match=r"veral holds no adapter 'c'; it holds shared, a, b"):
        compose(tiny_llava(), {"a": f"{folder}:c"}, router=ByTask())


def test_adapters_are_frozen_on_request_and_those_that_were_stay_so(saved: dict[str, Path], tmp_path: Path) -> None:
    one = alone(LoRA(), expert=True)
    one.freeze("mine")
    one.save(tmp_path / "cold")
    some = compose(tiny_llava(), {"cold": tmp_path / "cold", "ask": saved["ask"]}, router=ByTask())
    assert some.frozen == ("cold",)
    every = compose(tiny_llava(), saved, router=Softmax(), shared=saved["ask"], frozen=True)
    assert every.frozen == ("shared", *SPECS)
    assert all("routers" in name for name, p in every.named_adapter_parameters() if p.requires_grad)
    assert_same_tensors(tensors_of(every, "find"), tensors_of(alone(SPECS["find"], expert=True), "mine"))


def test_adapters_of_different_dropouts_are_refused_unless_one_is_given(tmp_path: Path) -> None:
    for name, dropout in (("a", 0.1), ("b", 0.2)):
        alone(LoRA(dropout=dropout), expert=True).save(tmp_path / name)
    folders = {name: tmp_path / name for name in "ab"}
    with pytest.raises(ValueError, match="share a dropout mask"):
        compose(tiny_llava(), folders, router=ByTask())
    mixture = compose(tiny_llava(), folders, router=ByTask(), dropout=0.0)
    assert {spec.dropout for spec in mixture.spec.experts.values()} == {0.0}  # type: ignore[attr-defined]


def test_what_cannot_be_composed_is_refused_and_leaves_the_base_alone(saved: dict[str, Path], tmp_path: Path) -> None:
    base, other = tiny_llava(), tiny_llava()
    with torch.no_grad():
        other.lm_head.weight[0, 0] += 1
    cases: list[tuple[Any, dict[str, Any], str]] = [
        (tiny_llama(), saved, "was trained on .* has another class; load the base it was trained on"),
        (other, saved, "has other weights"),
        (base, {"a": tmp_path / "nothing"}, "there is no folder .*nothing; give one, or a hub name"),
        (base, {"a/b": saved["ask"]}, "adapter name 'a/b' is refused"),
        (base, {"shared": saved["ask"]}, "an expert cannot be called 'shared'; pass that adapter as shared="),
    ]
    for given, folders, message in cases:
        modules = {path: id(module) for path, module in given.named_modules()}
        with pytest.raises(ValueError, match=message):
            compose(given, folders, router=ByTask())
        assert {path: id(module) for path, module in given.named_modules()} == modules
    attach(base, shared=LoRA())
    with pytest.raises(ValueError, match="carries a mixture already"):
        compose(base, saved, router=ByTask())


def test_rerouting_keeps_bits_frozen_state_and_mode() -> None:
    base = tiny_llava()
    mixture = attach(base, shared=LoRA(rank=2), experts={"ask": LoRA(rank=3), "tell": LoRA()}, router=Softmax())
    randomize(mixture)
    mixture.freeze("tell")
    mixture.train()
    mixture.gradient_checkpointing_enable()
    before = {name: tensors_of(mixture, name) for name in ("shared", *mixture.experts)}
    again = reroute(mixture, Constant(weights=(0.25, 0.75)))
    assert again.base is base
    assert not mixture.attached
    assert (again.frozen, again.training, again.checkpoints) == (("tell",), True, True)
    for name, expected in before.items():
        assert_same_tensors(tensors_of(again, name), expected)
    with again.override({"ask": 0.25, "tell": 0.75}):
        expected = logits(again)
    assert torch.equal(logits(again), expected)


def test_a_router_that_does_not_fit_leaves_the_mixture_as_it_was() -> None:
    mixture = attach(tiny_llava(), experts={"ask": LoRA(), "tell": LoRA()}, router=Softmax()).eval()
    randomize(mixture)
    expected = logits(mixture)
    with pytest.raises(ValueError, match="TopK needs 3 experts or more"):
        reroute(mixture, TopK(k=3))
    assert torch.equal(logits(mixture), expected)
    with pytest.raises(ValueError, match="0 experts and a router"):
        reroute(attach(tiny_llava(), shared=LoRA()), ByTask())
    mixture.detach()
    with pytest.raises(ValueError, match="was detached"):
        reroute(mixture, ByTask())
