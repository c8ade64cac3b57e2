"""How LoRAs train: learning rates of their own for `up`, one dropout mask a site."""

from typing import Any

import pytest
import torch
from torch import nn

import moadapt
from moadapt.adapters import Adapter, Bank, LoRA
from moadapt.adapters.lora_bank import LoRABank
from moadapt.sites import Site
from moadapt.training.optimization import Optimization, parameter_groups
from moadapt.training.optimizer import ExpertAdamW
from moadapt.training.roles import Role
from moadapt_routers import Constant
from tests.models import randomize, tiny_llama

SITE = Site("linear", "language", "mlp", 0, 6, 5)


def groups_of(bank: Bank, settings: Optimization) -> list[dict[str, Any]]:
    """Group the parameters of one bank as a training does."""
    rates = bank.rates()
    named = {name: p for name, p in bank.named_parameters() if p.requires_grad}
    return parameter_groups({p: Role("language", "expert", rates.get(n, 1.0)) for n, p in named.items()}, settings)


def test_up_takes_the_step_of_a_higher_rate() -> None:
    bank = LoRABank(SITE, [Adapter("a", LoRA(rank=2, lr_ratio=16), 0)], nn.Linear(6, 5)).double()
    nn.init.normal_(bank.expert_up)
    settings = Optimization(learning_rate=1e-3, weight_decay=0.1)
    before = {name: p.detach().clone() for name, p in bank.named_parameters()}
    optimizer = ExpertAdamW(
        groups_of(bank, settings), [{bank.get_parameter(n): r for n, r in bank.expert_rows().items()}]
    )
    x = torch.randn(3, 4, 6, dtype=torch.float64)
    bank(
        x, torch.zeros(3, 4, 5, dtype=torch.float64), moadapt.Routing.constant(torch.ones(1))
    ).square().sum().backward()
    optimizer.step()
    for name, rate in (("expert_down", 1e-3), ("expert_up", 16e-3)):
        gradient = bank.get_parameter(name).grad
        step = gradient / (gradient.abs() + 1e-8)  # at the first step both moments are those of the gradient alone
        expected = before[name] * (1 - rate * settings.weight_decay) - rate * step
        torch.testing.assert_close(bank.get_parameter(name).detach(), expected, rtol=1e-10, atol=1e-12)


def test_another_ratio_makes_another_stack_with_equal_outputs() -> None:
    ids = torch.arange(12).reshape(2, 6)
    outputs = []
    for ratio in (1.0, 4.0):
        experts = {"a": LoRA(rank=2), "b": LoRA(rank=2, lr_ratio=ratio)}
        mixture = moadapt.attach(tiny_llama(), experts=experts, router=Constant())
        assert all(len(wrapper) == (1 if ratio == 1 else 2) for wrapper in banks_by_site(mixture))
        for site, bank in mixture.banks():
            for name in bank.names:
                generator = torch.Generator().manual_seed(len(site.path) + ord(name))
                state = {n: torch.randn(t.shape, generator=generator) / 4 for n, t in bank.state(name).items()}
                bank.load_state(name, state)
        with torch.no_grad():
            outputs.append(mixture(input_ids=ids).logits)
    torch.testing.assert_close(*outputs, rtol=1e-5, atol=1e-5)


def banks_by_site(mixture: Any) -> list[list[Bank]]:
    found: dict[str, list[Bank]] = {}
    for site, bank in mixture.banks():
        found.setdefault(site.path, []).append(bank)
    return list(found.values())


@pytest.mark.parametrize("ratio", [0.0, -1.0, float("inf"), float("nan")])
def test_a_ratio_out_of_range_is_refused(ratio: float) -> None:
    with pytest.raises(ValueError, match="lr_ratio"):
        LoRA(lr_ratio=ratio)


def test_adapters_of_a_site_share_one_dropout_mask() -> None:
    adapters = [Adapter(name, LoRA(rank=2, dropout=0.5), i) for i, name in enumerate("ab")]
    bank = LoRABank(SITE, adapters, nn.Linear(6, 5)).train()
    nn.init.normal_(bank.expert_up)
    x, y = torch.randn(2, 4, 6), torch.zeros(2, 4, 5)

    def added(*weights: float) -> torch.Tensor:
        torch.manual_seed(5)
        return bank(x, y, moadapt.Routing.constant(torch.tensor(weights)))

    torch.testing.assert_close(added(1.0, 1.0), added(1.0, 0.0) + added(0.0, 1.0))
    assert not torch.allclose(added(1.0, 0.0), bank.eval()(x, y, moadapt.Routing.constant(torch.tensor([1.0, 0.0]))))


def test_a_change_of_basis_inside_an_adapter_changes_no_merge() -> None:
    mixture = moadapt.attach(tiny_llama(), experts={"a": LoRA(rank=3), "b": LoRA(rank=3)}, router=Constant())
    randomize(mixture)
    before, _ = mixture.merge("task", task="a")
    for _, bank in mixture.banks():
        state = bank.state("a")
        basis = torch.eye(3) + torch.randn(3, 3) / 4
        bank.load_state("a", {"down": basis @ state["down"], "up": torch.linalg.inv(basis).T @ state["up"]})
    after, _ = mixture.merge("task", task="a")
    for name, parameter in before.named_parameters():
        torch.testing.assert_close(after.get_parameter(name), parameter, rtol=1e-4, atol=1e-5)
