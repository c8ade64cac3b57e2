"""Pruning by importance: the budget, the score, revival, masks, and how runs stop, resume and end."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from torch import Tensor, nn

from moadapt import load
from moadapt.adapters import LoRA
from moadapt.adapters.bank import Adapter
from moadapt.adapters.lora_bank import LoRABank
from moadapt.bases import load_base
from moadapt.ranks import Importance
from moadapt.ranks.allocator import highest
from moadapt.ranks.importance import ImportanceDriver, budget_at
from moadapt.sites import Site
from moadapt.training import MixedTasks
from tests.ranks.pruned import NARROW, RANK, SHARED, WIDE, banks, fitted, module, resumed
from tests.training import toy
from tests.training.runs import trainer

FORTY = Importance(budget=40, start=0.1, settle=0.3, every=2)


def give_gradients(driver: ImportanceDriver, found: list[tuple[Site, LoRABank]], seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _, bank in found:
        for parameter in bank.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
    driver.observe()


def active(found: list[tuple[Site, LoRABank]]) -> int:
    return sum(int((p != 0).any(dim=1).sum()) for _, b in found for n, p in b.named_parameters() if n.endswith("up"))


def test_the_budget_falls_as_published() -> None:
    found = {step: budget_at(step, 144, 72, 10, 20, 100) for step in (0, 9, 10, 30, 50, 80, 100)}
    assert found == {0: 144, 9: 144, 10: 144, 30: 98, 50: 78, 80: 72, 100: 72}


def test_as_many_terms_are_active_as_the_budget_says() -> None:
    found = banks()
    settings = Importance(budget=5, every=10)
    driver = settings.driver(found, 100)
    assert active(found) == driver.first == 14
    for step in range(1, 101):
        give_gradients(driver, found, step)
        with torch.no_grad():  # the optimiser moves every term, pruned ones too
            for _, bank in found:
                for parameter in bank.parameters():
                    parameter.sub_(0.01 * parameter.grad)
        driver.act()
        if step % 10 == 0 or step > 80:
            assert active(found) == budget_at(step, 14, 5, 10, 20, 100)
            assert driver.readings() == {"ranks/ranks": active(found)}


@pytest.mark.parametrize(("start", "settle", "steps"), [(0.4, 0.5, 3), (0.45, 0.5, 7), (0.0, 0.9, 1)])
def test_the_last_choice_spends_the_last_budget(start: float, settle: float, steps: int) -> None:
    found = banks()
    driver = Importance(budget=5, start=start, settle=settle).driver(found, steps)
    for step in range(steps):
        give_gradients(driver, found, step)
        driver.act()
    assert active(found) == 5


def test_a_fit_that_stops_early_is_pruned_when_it_is_finished() -> None:
    found = banks()
    driver = Importance(budget=5).driver(found, 100)
    for step in range(15):
        give_gradients(driver, found, step)
        driver.act()
    assert active(found) > 5
    driver.finish()
    assert active(found) == 5
    kept = driver.kept.clone()
    driver.finish()
    assert torch.equal(driver.kept, kept)


def test_a_budget_that_pays_for_no_term_or_counts_in_fractions_is_refused() -> None:
    with pytest.raises(ValueError, match=r"budget=0\.01, which is 0 of the 14 ranks that the fit starts with"):
        Importance(budget=0.01).driver(banks(), 10)
    with pytest.raises(ValueError, match=r"budget=7, which is 7 of the 140 parameters .* and a term takes 8"):
        Importance(budget=7, unit="parameters").driver(banks(), 10)
    with pytest.raises(ValueError, match=r"budget=1\.5; up to 1 it is a share of the start, above that a whole number"):
        Importance(budget=1.5)


def test_parameters_are_never_more_than_the_budget() -> None:
    found = banks()
    driver = Importance(budget=50, unit="parameters", start=0, every=1).driver(found, 10)
    assert driver.first == 7 * 2 * WIDE + 7 * 2 * NARROW
    for step in range(10):
        give_gradients(driver, found, step)
        driver.act()
    kept = sum(
        int((p != 0).any(dim=1).sum()) * 2 * p.shape[1]
        for _, bank in found
        for name, p in bank.named_parameters()
        if name.endswith("up")
    )
    assert 50 - 2 * NARROW < kept <= 50


def test_scores_are_those_of_the_formula() -> None:
    found = banks()
    driver = Importance(smoothing=(0.85, 0.6)).driver(found, 10)
    terms = driver.terms["blocks.0/shared"]
    bank = found[0][1]
    mean = {name: torch.tensor(0.0) for name in ("down", "up", "factor")}
    spread = dict(mean)
    for seed in range(3):
        give_gradients(driver, found, seed)
        down, up = bank.get_parameter("shared_down"), bank.get_parameter("shared_up")
        sensitivity: dict[str, Tensor] = {
            "down": (down * down.grad).abs(),
            "up": (up * up.grad).abs(),
            "factor": torch.stack([up[i] @ up.grad[i] for i in range(RANK)]).abs().unsqueeze(1),
        }
        for name, size in sensitivity.items():
            mean[name] = 0.85 * mean[name] + 0.15 * size
            spread[name] = 0.6 * spread[name] + 0.4 * (size - mean[name]).abs()
    expected = sum((mean[name] * spread[name]).mean(dim=1) for name in mean)
    torch.testing.assert_close(terms.scores(), expected.detach(), rtol=1e-5, atol=1e-9)


def test_the_factor_of_a_term_has_the_gradient_that_the_score_takes_for_it() -> None:
    site = Site("blocks.0", "language", "mlp", 0, WIDE, WIDE)
    bank = LoRABank(site, [Adapter(SHARED, LoRA(rank=RANK), None)], nn.Linear(WIDE, WIDE)).double()
    nn.init.normal_(bank.get_parameter("shared_up"))
    x = torch.randn(2, 3, WIDE, dtype=torch.float64)
    target = torch.randn(2, 3, WIDE, dtype=torch.float64)
    (bank(x, torch.zeros_like(x), None) - target).square().sum().backward()
    down, up = bank.get_parameter("shared_down"), bank.get_parameter("shared_up")
    factor = torch.ones(RANK, dtype=torch.float64, requires_grad=True)
    ((x @ down.detach().T * factor) @ up.detach() - target).square().sum().backward()
    torch.testing.assert_close((up * up.grad).sum(dim=1), factor.grad, rtol=1e-10, atol=1e-10)


def test_a_pruned_term_keeps_its_gradient_and_can_come_back() -> None:
    found = banks()[:1]
    bank = found[0][1]
    driver = Importance(budget=1, start=0, settle=0, every=1).driver(found, 2)
    driver.terms["blocks.0/shared"].prune(torch.tensor([False, True, True]))
    x = torch.randn(2, 3, WIDE, dtype=torch.float64)
    bank(x, torch.zeros_like(x), None).square().sum().backward()
    up = bank.get_parameter("shared_up")
    assert not up[0].any()
    assert up.grad is not None
    assert up.grad[0].abs().min() > 0


def test_an_expert_that_no_row_used_keeps_its_scores() -> None:
    found = banks()
    driver = Importance().driver(found, 10)
    give_gradients(driver, found)
    before = driver.terms["blocks.0/expert"].scores()
    for _, bank in found:
        for name in ("expert_down", "expert_up"):
            gradient = bank.get_parameter(name).grad
            assert gradient is not None
            gradient[:2] = 0
    driver.observe()
    after = driver.terms["blocks.0/expert"].scores()
    assert torch.equal(after[:2], before[:2])
    assert (after[2:] != before[2:]).all()


def test_ties_go_to_the_first_and_what_costs_too_much_is_passed_over() -> None:
    ones = torch.ones(4, dtype=torch.long)
    assert highest(torch.tensor([1.0, 2.0, 1.0, 1.0]), ones, 3).tolist() == [True, True, True, False]
    costs = torch.tensor([5, 2, 4])
    assert highest(torch.tensor([50.0, 4.0, 20.0]), costs, 8).tolist() == [True, True, False]


@pytest.mark.parametrize(
    "settings", [{"budget": 0}, {"start": 0.5, "settle": 0.5}, {"every": 0}, {"smoothing": (1.0, 0.5)}]
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="Importance"):
        Importance(**settings)


def test_a_fit_without_an_end_and_a_budget_above_the_start_are_refused() -> None:
    with pytest.raises(ValueError, match="give the trainer max_steps"):
        Importance().driver(banks(), float("inf"))
    with pytest.raises(ValueError, match="budget=15, but the fit starts with 14 ranks"):
        Importance(budget=15).driver(banks(), 10)
    with pytest.raises(ValueError, match="need LoRAs that train and start at zero"):
        Importance().driver([], 10)


class StopAt(Callback):
    """Ends a fit after two steps, as early stopping would."""

    def on_train_batch_end(self, trainer: Any, *rest: Any) -> None:
        trainer.should_stop = trainer.global_step == 2


def test_finishing_a_stopped_fit_saves_what_the_budget_says(tmp_path: Path, base: str) -> None:
    made = module(base, FORTY)
    fit = trainer(tmp_path, StopAt(), max_steps=11, limit_val_batches=0)
    fit.fit(made, datamodule=MixedTasks(base, toy.toy_tasks(tmp_path), batch_size=3, num_workers=0))
    assert fit.global_step == 2
    ranks = [len(bank.state(name)["up"]) for _, bank in made.finish().banks() for name in bank.names]
    assert sum(ranks) == 40


@pytest.mark.parametrize("accumulated", [1, 2])
def test_a_stopped_run_ends_as_the_whole_one(tmp_path: Path, base: str, accumulated: int) -> None:
    options = {"max_steps": 11, "accumulate_grad_batches": accumulated}
    expected = resumed(tmp_path, base, FORTY, ("train", 5), **options)
    kept = [(tensor != 0).any(dim=1).sum() for name, tensor in expected.items() if name.endswith("/up")]
    assert int(sum(kept)) == 40


def test_a_finished_mixture_is_trimmed_and_saves_what_it_computes(tmp_path: Path, base: str) -> None:
    made = fitted(tmp_path / "run", base, FORTY, max_steps=11)
    assert made is not None
    ids = torch.arange(5, 14).reshape(3, 3)
    tasks = ["small", "large", "small"]
    with torch.no_grad():
        expected = made.mixture.eval()(input_ids=ids, task=tasks).logits
        trimmed = made.finish()
        torch.testing.assert_close(trimmed(input_ids=ids, task=tasks).logits, expected, rtol=1e-6, atol=1e-6)
        trimmed.save(tmp_path / "mixture")
        loaded = load(tmp_path / "mixture", load_base(base)[0])
        assert torch.equal(loaded(input_ids=ids, task=tasks).logits, trimmed(input_ids=ids, task=tasks).logits)
    ranks = [len(bank.state(name)["up"]) for _, bank in loaded.banks() for name in bank.names]
    assert sum(ranks) == 40
