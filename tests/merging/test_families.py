"""Merges of families with biases and gains: their errors count everything, and what a LoRA cannot hold is refused."""

import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor

from moadapt import Mixture, Placement, attach
from moadapt.adapters import Bias, FamilySpec, Hydra, LoRA, NormTuning, Scale
from moadapt.adapters.delta import Delta
from moadapt.merging import calibration
from moadapt.registry import MERGES
from moadapt_routers import Softmax
from tests.models import llava_batch, randomize, tiny_llama, tiny_llava

EVERYWHERE = Placement(towers=("vision", "connector", "language"))
MIXTURES: dict[str, tuple[FamilySpec | None, dict[str, FamilySpec]]] = {
    "bias": (Bias(), {"a": Bias(), "b": Bias()}),
    "scale": (Scale(), {"a": Scale(), "b": Scale()}),
    "norm_tuning": (None, {"a": NormTuning(), "b": NormTuning()}),
    "hydra": (Hydra(rank=2), {"a": Hydra(rank=2), "b": Hydra(rank=1)}),
    "mixed": (Bias(), {"a": LoRA(rank=2), "b": Scale(placement=EVERYWHERE), "c": NormTuning(), "d": Hydra(rank=1)}),
}


def attached(name: str, router: Any) -> Mixture:
    shared, experts = MIXTURES[name]
    mixture = attach(tiny_llava(), shared=shared, experts=experts, router=router, placement=EVERYWHERE)
    randomize(mixture, 0.1)
    return mixture.eval()


def change(banks: list[Any], weights: Tensor) -> Tensor:
    """The whole change of a site's parameters in one row of numbers."""
    total = torch.zeros(1)
    for delta in (bank.delta(weights) for bank in banks):
        bias = torch.zeros(delta.up.shape[1]) if delta.bias is None else delta.bias
        total = total + torch.cat([delta.weight().flatten(), bias])
    return total


@pytest.mark.parametrize("name", MIXTURES)
def test_the_error_of_a_site_counts_all_that_is_added_there(name: str) -> None:
    mixture, batch = attached(name, Softmax(scope="token", per="site")), llava_batch()
    with torch.no_grad(), mixture.trace() as trace:
        mixture(**batch)
    _, report = mixture.merge("mean_routing", calibration=batch)
    place_of = {path: place.name for place in mixture.places for path in place.sites}
    banks: dict[str, list[Any]] = {}
    for site, bank in mixture.banks():
        banks.setdefault(site.path, []).append(bank)
    assert set(report.sites) == set(banks)
    for path, here in banks.items():
        if path not in place_of:
            assert report.sites[path] == 0
            continue
        weights = torch.cat([w.reshape(-1, w.shape[-1]) for w in trace.routings[place_of[path]]])
        merged, routed = change(here, weights.mean(0)), [change(here, row) for row in weights]
        apart = sum(float((one - merged).square().sum()) for one in routed)
        expected = (apart / sum(float(one.square().sum()) for one in routed)) ** 0.5
        assert report.sites[path] == pytest.approx(expected, rel=1e-3, abs=1e-5), path
        assert expected > 1e-4
    assert report.output_kl is not None
    assert report.output_kl > 0


@pytest.mark.parametrize("name", ["bias", "mixed"])
@pytest.mark.parametrize("method", sorted(set(MERGES.names()) - {"task", "lorahub"}))
def test_methods_merge_biases_gains_and_dense_changes_too(method: str, name: str) -> None:
    """All but distillation, which trains low-rank changes and says so."""
    mixture = attached(name, Softmax(scope="token", per="site"))
    rows = [{**llava_batch(rows=8), "task": [*mixture.experts] * (8 // len(mixture.experts))}]
    if method == "distillation":
        with pytest.raises(ValueError, match=r"trains a LoRA, and merge 'least_squares' makes another change at \w+"):
            mixture.merge(method, calibration=rows)
        return
    merged, report = mixture.merge(method, calibration=rows)
    assert report.sites.keys() == {site.path for site, _ in mixture.banks()}
    assert all(0 <= error < 10 for error in report.sites.values())
    assert all(bool(parameter.isfinite().all()) for parameter in merged.parameters())
    if method in ("regression", "least_squares"):
        _, mean = mixture.merge("mean_routing", calibration=rows)
        for path, error in report.outputs.items():
            assert error <= mean.outputs[path] + 1e-5, path


@pytest.mark.parametrize("name", ["bias", "scale", "norm_tuning"])
def test_a_lora_folder_refuses_what_it_cannot_hold(name: str, tmp_path: Path) -> None:
    mixture = attach(tiny_llava(), shared=next(iter(MIXTURES[name][1].values())), placement=EVERYWHERE)
    randomize(mixture, 0.1)
    with pytest.raises(ValueError, match="which a LoRA folder cannot hold; merge to"):
        mixture.export_peft(tmp_path / "lora")
    assert not (tmp_path / "lora").exists()


def test_a_lora_folder_holds_factors_and_biases(tmp_path: Path) -> None:
    mixture, batch = attach(tiny_llava(), shared=next(iter(MIXTURES["hydra"][1].values()))), llava_batch()
    randomize(mixture, 0.1)
    expected = mixture.eval()(**batch).logits
    assert mixture.export_peft(tmp_path / "lora").exact
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that layers without a bias get one, which peft itself could not merge
        loaded: Any = peft.PeftModel.from_pretrained(tiny_llava(), str(tmp_path / "lora"))
    torch.testing.assert_close(loaded(**batch).logits, expected, rtol=1e-4, atol=1e-5)


def test_a_bias_leaves_a_tied_weight_alone() -> None:
    base = tiny_llama()
    base.lm_head.weight = base.model.embed_tokens.weight
    mixture = attach(base, shared=Bias(placement=Placement(modules=("lm_head",))))
    randomize(mixture, 0.1)
    ids = torch.tensor([[5, 6, 7]])
    merged, _ = mixture.eval().merge("task")
    assert merged.lm_head.weight is merged.model.embed_tokens.weight
    with torch.no_grad():
        torch.testing.assert_close(merged(ids).logits, mixture(input_ids=ids).logits)


def test_the_error_of_a_site_takes_every_rank_once(monkeypatch: pytest.MonkeyPatch) -> None:
    ranks: list[int] = []
    whole = calibration._gram_of_matrices

    def counted(deltas: Any) -> Tensor:
        ranks.append(sum(len(delta.down) for delta in deltas))
        return whole(deltas)

    monkeypatch.setattr(calibration, "_gram_of_matrices", counted)
    mixture = attach(
        tiny_llava(), shared=LoRA(rank=3), experts={name: LoRA(rank=2) for name in "abcd"}, router=Softmax()
    )
    randomize(mixture, 0.1)
    mixture.eval().merge("mean_routing", calibration=llava_batch())
    assert set(ranks) == {3 + 4 * 2}


def test_dense_changes_are_multiplied_slice_by_slice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration, "_ROWS", 2)
    down, up, dense = torch.randn(3, 2, 4), torch.randn(3, 2, 5), torch.randn(3, 5, 4)
    deltas = [Delta(down[i], up[i], dense[i]) for i in range(2)] + [Delta(down[2], up[2])]
    flat = torch.stack([delta.weight().flatten() for delta in deltas]).double()
    torch.testing.assert_close(calibration._gram_of_matrices(deltas), flat @ flat.T, rtol=1e-5, atol=1e-5)
    gains = [Delta(torch.zeros(0, 5), torch.zeros(0, 5), dense[i, :, 0]) for i in range(2)]
    flat = torch.stack([dense[i, :, 0] for i in range(2)]).double()
    torch.testing.assert_close(calibration._gram_of_matrices(gains), flat @ flat.T)
