"""Merges of mixtures on quantised bases are plain models on the dequantised weights, and say what rounding lost."""

import json
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from moadapt import attach
from moadapt.adapters import Bias, FamilySpec, LoRA, PeftTuner, Scale
from moadapt.bases import load_base
from moadapt_routers import ByTask, Softmax
from tests.models import randomize
from tests.quantised.bases import LINEARS, WEIGHTS_ONLY, batch, quantised, weight_of

FAMILIES: dict[str, FamilySpec] = {
    "lora": LoRA(rank=2),
    "scale": Scale(),
    "bias": Bias(create=True),
    "dora": PeftTuner(kind="LORA", options={"r": 2, "use_dora": True}),
}


def mixture_on(base: Any, family: FamilySpec, router: Any = None) -> Any:
    torch.manual_seed(0)
    mixture = attach(base, experts={"a": family, "b": family}, router=router or ByTask())
    randomize(mixture, 0.1)
    return mixture.eval()


def relative(found: Any, wanted: Any) -> float:
    return float((found.detach().double() - wanted.double()).norm() / wanted.double().norm())


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("way", WEIGHTS_ONLY)
def test_the_plain_model_does_what_the_mixture_does(way: str, name: str, folder: str, tmp_path: Any) -> None:
    mixture = mixture_on(quantised(folder, way), FAMILIES[name])
    plain, report = mixture.merge("task", task="a")
    with torch.no_grad():
        wanted, found = mixture(**batch(), task="a").logits, plain(**batch()).logits
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    assert report.exact
    assert {type(m) for p, m in plain.named_modules() if p.endswith(LINEARS)} == {nn.Linear}
    assert all(type(p) is nn.Parameter and p.dtype == torch.float32 and p.requires_grad for p in plain.parameters())
    plain.save_pretrained(tmp_path / "plain")
    assert "quantization_config" not in json.loads((tmp_path / "plain" / "config.json").read_text())
    if name != "bias":  # its class does not know of biases that were made
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "plain").eval()
        with torch.no_grad():
            assert torch.equal(again(**batch()).logits, found)


@pytest.mark.parametrize("way", WEIGHTS_ONLY)
def test_rounding_is_measured_against_dequantised_weight_plus_change(way: str, folder: str) -> None:
    base = quantised(folder, way)
    frozen = {path: weight_of(m) for path, m in base.named_modules() if path.endswith(LINEARS)}
    mixture = mixture_on(base, LoRA(rank=2))
    changes = {site.path: bank.delta(torch.tensor([0.0, 1.0])).weight() for site, bank in mixture.banks()}
    exact = {path: weight.double() + changes[path].double() for path, weight in frozen.items()}
    plain, report = mixture.merge("task", task="b", dtype=torch.bfloat16)
    assert {p.dtype for p in plain.parameters()} == {torch.bfloat16}
    assert plain.config.dtype == torch.bfloat16
    lost, whole = 0.0, 0.0
    for path, wanted in exact.items():
        stored = plain.get_submodule(path).weight.detach()
        torch.testing.assert_close(stored.double(), wanted, rtol=2**-8, atol=1e-5)
        assert report.rounding[f"{path}.weight"] == pytest.approx(relative(stored, wanted), rel=1e-3)
        assert 5e-4 < report.rounding[f"{path}.weight"] < 2**-8
        lost, whole = lost + float((stored.double() - wanted).square().sum()), whole + float(wanted.square().sum())
    biases = [(p.detach(), base.get_parameter(n)) for n, p in plain.named_parameters() if n.endswith("proj.bias")]
    lost += sum(float((found.double() - wanted.double()).square().sum()) for found, wanted in biases)
    whole += sum(float(wanted.double().square().sum()) for _, wanted in biases)
    assert report.total_rounding == pytest.approx((lost / whole) ** 0.5, rel=1e-3)
    assert json.loads(report.to_json())["total_rounding"] == report.total_rounding


def test_layers_without_adapters_are_dequantised_too(folder: str) -> None:
    base = quantised(folder, "int8")
    path = "model.layers.0.mlp.up_proj"
    wanted = weight_of(base.get_submodule(path))
    mixture = attach(base, shared=LoRA(rank=2, ranks={path: 0}))
    plain, report = mixture.merge("task")
    torch.testing.assert_close(plain.get_submodule(path).weight.data, wanted, rtol=1e-5, atol=1e-6)
    assert report.rounding[f"{path}.weight"] == 0
    assert set(report.dequantised) == {p for p, _ in base.named_modules() if p.endswith(LINEARS)}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("way", "exact"), [("int8", True), ("int4", True), ("nf4", True), ("llm_int8", False)])
def test_it_is_not_exact_where_inputs_are_quantised_too(way: str, exact: bool, dtype: str, folder: str) -> None:
    mixture = mixture_on(quantised(folder, way, dtype), LoRA(rank=2))
    plain, report = mixture.merge("task", task="a")
    assert report.exact is exact
    layer = mixture.base.get_submodule("model.layers.0.mlp.down_proj").module
    x = torch.randn(200, layer.in_features, generator=torch.Generator().manual_seed(3), dtype=getattr(torch, dtype))
    with torch.no_grad(), mixture.disabled():
        apart = relative(layer(x), x.double() @ weight_of_stored(mixture, "model.layers.0.mlp.down_proj").T)
    assert report.dequantised["model.layers.0.mlp.down_proj"] == pytest.approx(apart, rel=0.3, abs=1e-6)
    with torch.no_grad():
        assert relative(plain(**batch()).logits, mixture(**batch(), task="a").logits) < (1e-5 if dtype == "float32" and
            exact else 0.05)  # fmt: skip


def weight_of_stored(mixture: Any, path: str) -> Any:
    """The weight of a layer with fresh adapters folded in, in float64."""
    with mixture.override({"a": 0.0, "b": 0.0}):
        plain, _ = mixture.merge("task", task="a", dtype=torch.float64)
    return plain.get_submodule(path).weight.detach()


def test_a_plain_base_is_rounded_and_told_too(folder: str) -> None:
    mixture = mixture_on(load_base(folder, dtype="bfloat16")[0], LoRA(rank=2))
    _, kept = mixture.merge("task", task="a")
    finer, report = mixture.merge("task", task="a", dtype=torch.float32)
    assert 5e-4 < kept.total_rounding < 2**-8
    assert report.total_rounding == 0
    assert {p.dtype for p in finer.parameters()} == {torch.float32}
    assert kept.dequantised == report.dequantised == {}


def test_an_export_makes_no_plain_model_and_tells_of_no_rounding(folder: str, tmp_path: Any) -> None:
    mixture = mixture_on(quantised(folder, "int8"), LoRA(rank=2), Softmax())
    report = mixture.export_peft(tmp_path / "peft", method="mean_routing", calibration=batch())
    assert report.output_kl is not None
    only = mixture_on(quantised(folder, "int8"), LoRA(rank=2)).export_peft(tmp_path / "one", task="a")
    assert only.rounding == {}
