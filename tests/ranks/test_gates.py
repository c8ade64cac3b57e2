"""Gates: their gradient, the price, the budget, hardening, and how runs stop, resume and end."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from moadapt.adapters.lora_bank import LoRABank
from moadapt.mixture import Mixture
from moadapt.ranks import Gates, trim_ranks
from moadapt.ranks.gates import GateDriver
from moadapt.routing import Routing
from tests.ranks.pruned import WIDE, banks, fitted, resumed

HALF = Gates(budget=0.5, price=0, until=0.5)


def loss(bank: LoRABank, width: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    x, target = (torch.randn(3, 5, width, generator=generator, dtype=torch.float64) for _ in range(2))
    weights = torch.rand(3, 1, 1, 2, generator=generator, dtype=torch.float64)
    return (bank(x, torch.zeros_like(x), Routing(weights, num_experts=2)) - target).square().sum()


def run(driver: GateDriver, steps: int) -> None:
    """Take steps in which the loss does not ask for anything."""
    for _ in range(steps):
        driver.observe()
        driver.act()


def test_the_gradient_of_a_gate_is_that_of_the_joint_loss() -> None:
    found = banks()
    driver = Gates(price=0.7).driver(found, 100)
    for site, bank in found:
        loss(bank, site.in_features).backward()
    driver.observe()
    found_gradient, drawn = driver.logits.grad, driver._drawn()
    assert found_gradient is not None

    def joint(logits: Tensor) -> float:
        """The joint loss where the draw has the noise that it had."""
        noise = drawn.logit() * 2 / 3 - driver.logits.detach()
        factors = ((logits + noise) / (2 / 3)).sigmoid().tolist()
        for (_, bank), own in zip(found, (factors[:3], factors[3:]), strict=True):
            bank.gate(dict(zip(("shared", "a", "b"), own, strict=True)))
        costs = torch.tensor([3 * 12, 2 * 12, 2 * 12, 3 * 8, 2 * 8, 2 * 8])
        priced = 0.7 * (logits.sigmoid() * costs).sum() / costs.sum()
        return float(priced + sum(loss(bank, site.in_features).detach() for site, bank in found))

    for index in range(6):
        nudge = torch.zeros(6, dtype=torch.float64)
        nudge[index] = 1e-5
        slope = (joint(driver.logits.detach() + nudge) - joint(driver.logits.detach() - nudge)) / 2e-5
        assert float(found_gradient[index]) == pytest.approx(slope, rel=1e-6, abs=1e-8)


def test_a_price_without_end_shuts_every_gate_and_none_leaves_all_to_the_budget() -> None:
    dear = Gates(price=1e9, budget=1.0).driver(banks(), 200)
    run(dear, 200)
    assert not dear.kept.any()
    free = Gates(price=0, budget=1.0).driver(banks(), 200)
    run(free, 200)
    assert free.kept.all()


@pytest.mark.parametrize("budget", [0.99, 0.7, 0.4, 20, 16])
def test_the_budget_is_never_exceeded(budget: float) -> None:
    found = banks()
    driver = Gates(price=0, budget=budget).driver(found, 20)
    driver.logits.data.copy_(torch.randn(6, dtype=torch.float64))
    run(driver, 20)
    kept = sum(
        int((p != 0).any(dim=1).sum()) * 2 * p.shape[1] for _, b in found for n, p in b.named_parameters() if "up" in n
    )
    assert kept == int(driver.costs[driver.kept].sum()) > 0
    assert kept <= (budget if budget > 1 else budget * 140)


def test_draws_are_open_as_often_as_the_gate_says() -> None:
    driver = Gates(start=0.8).driver(banks(), 1e9)
    open_ = torch.stack([driver._drawn() > 0.5 for driver.step in range(2000)])
    assert float(open_.double().mean()) == pytest.approx(0.8, abs=4 * (0.16 / open_.numel()) ** 0.5)


def test_hardened_gates_are_shut_or_open_and_shut_ones_stay_shut() -> None:
    found = banks()
    driver = Gates(price=0, budget=0.5, until=0.5).driver(found, 4)
    run(driver, 2)
    kept, logits = driver.kept.clone(), driver.logits.detach().clone()
    assert 0 < int(kept.sum()) < 6
    for _, bank in found:
        for parameter in bank.parameters():
            parameter.data += 1  # the optimiser moves whatever has moments
    run(driver, 2)
    assert torch.equal(driver.kept, kept)
    assert torch.equal(driver.logits.detach(), logits)
    for each, stays in zip(driver.gated, kept.tolist(), strict=True):
        assert bool(each.up[each.rows].any()) == stays


def test_blended_experts_are_refused() -> None:
    bank = banks()[0][1]
    bank.gate({"a": 0.0})
    x = torch.zeros(1, 2, WIDE, dtype=torch.float64)
    blended = Routing(torch.full((1, 1, 1, 2), 0.5, dtype=torch.float64), num_experts=2, combines="parameters")
    with pytest.raises(ValueError, match="no gate can shut one out"):
        bank(x, x, blended)


@pytest.mark.parametrize("settings", [{"budget": 0}, {"price": -1}, {"until": 0}, {"start": 0.5}, {"start": 1.0}])
def test_settings_out_of_range_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="Gates"):
        Gates(**settings)


def test_what_cannot_be_searched_is_refused() -> None:
    with pytest.raises(ValueError, match="give the trainer max_steps"):
        Gates().driver(banks(), float("inf"))
    with pytest.raises(ValueError, match="a budget of 15 is 15 parameters, but the cheapest site takes 16 of 140"):
        Gates(budget=15).driver(banks(), 10)
    with pytest.raises(ValueError, match="need LoRAs that train and start at zero"):
        Gates().driver([], 10)


@pytest.mark.parametrize("at", [2, 6])
def test_a_stopped_run_ends_as_the_whole_one(tmp_path: Path, base: str, at: int) -> None:
    expected = resumed(tmp_path, base, HALF, ("train", at), max_steps=8)
    live = [bool(tensor.any()) for name, tensor in expected.items() if name.endswith("/up")]
    assert 0 < sum(live) < len(live)


def test_a_hardened_mixture_computes_what_gates_of_0_and_1_do(tmp_path: Path, base: str) -> None:
    made = fitted(tmp_path / "run", base, HALF, max_steps=8)
    assert made is not None
    driver = made._driver
    assert isinstance(driver, GateDriver)
    ids, tasks = torch.arange(5, 14).reshape(3, 3), ["small", "large", "small"]
    torch.manual_seed(0)

    def logits(mixture: Mixture) -> Tensor:
        with torch.no_grad():
            found: Tensor = mixture.eval()(input_ids=ids, task=tasks).logits
        return found

    for each, kept in zip(driver.gated, driver.kept.tolist(), strict=True):
        each.up.data[each.rows] = torch.randn_like(each.up[each.rows])  # the gate alone shuts it
        assert each.bank._gates[each.adapter] == float(kept)
    expected = logits(made.mixture)
    driver._prune()
    trimmed = trim_ranks(made.mixture)
    torch.testing.assert_close(logits(trimmed), expected, rtol=1e-5, atol=1e-5)
    parameters = sum(p.numel() for name, p in trimmed.named_adapter_parameters() if "router" not in name)
    assert parameters == int(driver.costs[driver.kept].sum()) <= driver.budget
