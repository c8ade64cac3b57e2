"""LoRAs whose `up` has a bias, against a loop over adapters."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moadapt import attach
from moadapt.adapters import LoRA
from moadapt.adapters.bank import Adapter
from moadapt.adapters.lora_offset import LoRAOffset
from moadapt.sites import Site
from moadapt_routers import ByTask
from tests.conformance.canonical import ROUTING_NAMES, routing_value
from tests.models import llava_batch, randomize, tiny_llava

SITE = Site("layer", "language", "mlp", 0, 6, 4)
SPECS = (LoRA(rank=2, alpha=3.0, bias=True), LoRA(rank=3, bias=True), LoRA(rank=1, rank_stabilized=True, bias=True))


def bank_of() -> LoRAOffset:
    adapters = [Adapter("shared", LoRA(rank=2, bias=True), None)]
    adapters += [Adapter(f"e{index}", spec, index) for index, spec in enumerate(SPECS)]
    bank = LoRA.bank(SITE, adapters, nn.Linear(6, 4))
    assert isinstance(bank, LoRAOffset)
    torch.manual_seed(3)
    for parameter in bank.parameters():
        nn.init.normal_(parameter)
    return bank.double()


def looped(bank: LoRAOffset, x: Tensor, weights: Tensor) -> Tensor:
    """One adapter after the other; weights are (B|1, T|1, H|1, E)."""
    total = torch.zeros(*x.shape[:2], 4, dtype=x.dtype)
    scales = {"shared": 1.0, **{f"e{index}": spec.scale for index, spec in enumerate(SPECS)}}
    for name, scale in scales.items():
        own = bank.state(name)
        change = scale * (x @ own["down"].T @ own["up"] + own["bias"])
        weight = weights[..., int(name[1:])] if name != "shared" else torch.ones(1, 1, 1, dtype=x.dtype)
        total += change * weight.repeat_interleave(4 // weight.shape[2], dim=2)
    return total


@pytest.mark.parametrize("name", [name for name in ROUTING_NAMES if name != "blended"])
def test_outputs_and_gradients_are_those_of_the_loop(name: str) -> None:
    bank, x = bank_of(), torch.randn(3, 5, 6, dtype=torch.float64)
    routing = routing_value(name, rows=3, tokens=5, dtype=torch.float64)
    out = bank(x, torch.zeros(3, 5, 4, dtype=torch.float64), routing)
    torch.testing.assert_close(out, looped(bank, x, routing.dense()), rtol=1e-10, atol=1e-10)
    out.sum().backward()
    assert bank.get_parameter("shared_bias").grad.tolist() == [[15.0] * 4]  # type: ignore[union-attr]


def test_each_experts_output_and_the_merge_have_their_biases() -> None:
    bank, x = bank_of(), torch.randn(2, 5, 6, dtype=torch.float64)
    ones = torch.eye(3, dtype=torch.float64)
    zero = torch.zeros(2, 5, 4, dtype=torch.float64)
    alone = looped(bank, x, torch.zeros(1, 1, 1, 3, dtype=torch.float64))
    expected = torch.stack([looped(bank, x, one.view(1, 1, 1, 3)) - alone for one in ones], dim=2)
    torch.testing.assert_close(bank.expert_outputs(x, zero, 3), expected)
    weights = torch.tensor([0.5, 0.0, -2.0], dtype=torch.float64)
    delta = bank.delta(weights)
    assert delta.bias is not None
    torch.testing.assert_close(
        x @ delta.down.T @ delta.up + delta.bias, looped(bank, x, weights.view(1, 1, 1, 3)), rtol=1e-10, atol=1e-10
    )


def test_parameters_with_a_bias_are_not_blended() -> None:
    with pytest.raises(ValueError, match="cannot be blended, as they have a bias"):
        bank_of().check_blending(SITE, 3, 1)


def test_a_mixture_starts_as_its_base_and_merges_exactly() -> None:
    base, batch = tiny_llava(), llava_batch()
    expected = base(**batch).logits
    experts: dict[str, Any] = {"a": LoRA(rank=2, bias=True), "b": LoRA(rank=3)}
    mixture = attach(base, shared=LoRA(bias=True), experts=experts, router=ByTask())
    assert torch.equal(mixture(**batch, task="a").logits, expected)
    randomize(mixture, 0.1)
    plain, report = mixture.merge("task", task="a")
    assert report.exact
    torch.testing.assert_close(plain(**batch).logits, mixture(**batch, task="a").logits, rtol=1e-5, atol=1e-5)
