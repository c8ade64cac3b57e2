"""Hydra against its equations: two branches, both against the frozen layer, and the plain layer they merge to."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from moadapt import Placement, attach
from moadapt.adapters import Hydra, LoRA
from moadapt.adapters.bank import Adapter
from moadapt.adapters.hydra import HydraBank
from moadapt.sites import Site
from tests.conformance.canonical import routing_value
from tests.models import llava_batch, randomize, tiny_llama, tiny_llava

ROWS, TOKENS, WIDE, NARROW = 3, 4, 6, 4
SITE = Site("blocks.0.fc2", "language", "mlp", 0, WIDE, NARROW, has_bias=True)
SPECS = {"shared": Hydra(rank=3, alpha=5.0), "a": Hydra(rank=2), "b": Hydra(rank=1, alpha=0.5)}


def build(module: nn.Module, specs: dict[str, Hydra] = SPECS) -> HydraBank:
    """A random float64 bank."""
    torch.manual_seed(0)
    experts = [name for name in specs if name != "shared"]
    adapters = [Adapter(n, spec, experts.index(n) if n in experts else None) for n, spec in specs.items()]
    bank = HydraBank(SITE, adapters, module.double()).double()
    for parameter in bank.parameters():
        nn.init.normal_(parameter)
    return bank


def added(bank: HydraBank, name: str, x: Tensor, y: Tensor) -> Tensor:
    """What one adapter adds, by the equation."""
    one, spec = bank.state(name), SPECS[name]
    scale = 1.0 if spec.alpha is None else spec.alpha / spec.rank
    return scale * (x @ one["down"].T @ one["up"] + y @ one["serial_down"].T @ one["serial_up"])


@pytest.mark.parametrize("name", ["constant", "task", "token_dense"])
def test_both_branches_follow_the_equation(name: str) -> None:
    module = nn.Linear(WIDE, NARROW)
    bank, routing = build(module), routing_value(name, rows=ROWS, tokens=TOKENS, experts=2, dtype=torch.float64)
    x = torch.randn(ROWS, TOKENS, WIDE, dtype=torch.float64)
    y = module(x)
    weights = routing.dense()[:, :, 0]
    expected = added(bank, "shared", x, y)
    for expert, each in enumerate(("a", "b")):
        expected = expected + weights[..., [expert]] * added(bank, each, x, y)
    torch.testing.assert_close(bank(x, y, routing), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    "module",
    [nn.Linear(WIDE, NARROW), nn.Linear(WIDE, NARROW, bias=False), Conv1D(NARROW, WIDE)],
    ids=["bias", "no bias", "transposed"],
)
def test_two_adapters_merge_against_the_frozen_layer(module: Any) -> None:
    bank = build(module)
    weights = torch.tensor([0.4, -1.5], dtype=torch.float64)
    frozen = module.weight.T if isinstance(module, Conv1D) else module.weight
    change, offset = torch.zeros_like(frozen), torch.zeros(NARROW, dtype=torch.float64)
    for name, weight in zip(SPECS, [1.0, *weights.tolist()], strict=True):
        one, spec = bank.state(name), SPECS[name]
        scale = weight * (1.0 if spec.alpha is None else spec.alpha / spec.rank)
        serial = scale * one["serial_up"].T @ one["serial_down"]
        change = change + scale * one["up"].T @ one["down"] + serial @ frozen
        offset = offset if module.bias is None else offset + serial @ module.bias
    delta = bank.delta(weights)
    torch.testing.assert_close(delta.weight(), change.detach(), rtol=1e-10, atol=1e-10)
    if module.bias is None:
        assert delta.bias is None
    else:
        torch.testing.assert_close(delta.bias, offset.detach(), rtol=1e-10, atol=1e-10)


def test_the_parallel_branch_alone_is_lora() -> None:
    batch = llava_batch()
    hydra = attach(tiny_llava(), shared=Hydra(rank=4, alpha=6.0, branches="parallel")).eval()
    lora = attach(tiny_llava(), shared=LoRA(rank=4, alpha=6.0)).eval()
    randomize(hydra)
    for (_, ours), (_, theirs) in zip(hydra.banks(), lora.banks(), strict=True):
        theirs.load_state("shared", ours.state("shared"))
    torch.testing.assert_close(hydra(**batch).logits, lora(**batch).logits, rtol=1e-4, atol=1e-4)


def test_the_serial_branch_alone_is_a_linear_map_behind_the_layer() -> None:
    module = nn.Linear(WIDE, NARROW)
    bank = build(module, {"shared": Hydra(rank=2, branches="serial")})
    state = bank.state("shared")
    assert set(state) == {"serial_down", "serial_up"}
    x = torch.randn(ROWS, TOKENS, WIDE, dtype=torch.float64)
    behind = torch.eye(NARROW, dtype=torch.float64) + state["serial_up"].T @ state["serial_down"]
    y = module(x)
    torch.testing.assert_close(y + bank(x, y, None), y @ behind.T, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("branches", "outs"), [("both", 3), ("parallel", 1), ("serial", 2)])
def test_the_number_of_parameters_is_that_of_the_paper(branches: Any, outs: int) -> None:
    mixture = attach(tiny_llava(), shared=Hydra(rank=2, branches=branches), placement=Placement(kinds=("mlp",)))
    ins = 0 if branches == "serial" else 1
    expected = sum(2 * (ins * site.in_features + outs * site.out_features) for site in mixture.sites)
    assert sum(p.numel() for _, p in mixture.named_adapter_parameters()) == expected


def test_a_base_without_biases_exports_it_as_a_lora(tmp_path: Path) -> None:
    mixture = attach(tiny_llama(), shared=Hydra(rank=2)).eval()
    randomize(mixture, 0.1)
    mixture.export_peft(tmp_path / "lora")
    ids = llava_batch()["input_ids"]
    loaded = PeftModel.from_pretrained(tiny_llama(), str(tmp_path / "lora")).eval()
    torch.testing.assert_close(loaded(input_ids=ids).logits, mixture(input_ids=ids).logits, rtol=1e-4, atol=1e-4)


def test_what_adapters_are_compared_by_is_their_change() -> None:
    bank = build(nn.Linear(WIDE, NARROW))
    factors = bank.low_rank()
    for name in SPECS:
        mine = [i for i, owner in enumerate(factors.owners) if owner == name]
        alone = build(nn.Linear(WIDE, NARROW), {"shared": SPECS[name]})
        alone._module = bank._module
        alone.load_state("shared", bank.state(name))
        found = factors.up[mine].T @ factors.down[mine]
        torch.testing.assert_close(found, alone.delta(torch.zeros(0)).weight(), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("wrong", [{"rank": 0}, {"branches": "none"}], ids=str)
def test_bad_options_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="need rank >= 1 and branches both, parallel or serial"):
        Hydra(**wrong)
