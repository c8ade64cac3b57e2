"""Balance between tasks in training: over processes, accumulated batches and stops, and what it leaves alone."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from moadapt.adapters import LoRA
from moadapt.balancing import Balance, CAGrad, DynamicAverage, Fixed, GradNorm, PCGrad, Uncertainty
from moadapt.registry import BALANCES
from moadapt.training import FSDP2Strategy, MixedTasks, MixtureModule, Optimization, SkipBadSteps, data
from moadapt.training.conflict_log import LogConflicts
from moadapt.training.module import TaskModule
from moadapt_routers import ByTask, Poly
from tests.training import runs, toy
from tests.training.processes import assert_same, fit
from tests.training.runs import trainer
from tests.training.test_ddp import EXACT, FAST, FirstAlone, made, mixture

METHODS = {name: spec() for name, spec in BALANCES} | {
    "fixed": Fixed(weights={"small": 0.3, "large": 2.0}),
    "dynamic_average": DynamicAverage(every=1),
    "gradnorm": GradNorm(learning_rate=0.5),
    "cagrad": CAGrad(c=0.9),
}
"""Every method, with settings under which three steps show what it does."""
over_methods = pytest.mark.parametrize("balance", [pytest.param(spec, id=name) for name, spec in METHODS.items()])


@over_methods
def test_two_processes_with_different_tasks_balance_as_one(
    tmp_path: Path, base: str, balance: Balance, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each process has one of the tasks, and in the second step there is one alone."""
    monkeypatch.setattr(data, "MixedOrder", FirstAlone)

    def making(balance: Balance | None) -> Callable[[], tuple[TaskModule, MixedTasks]]:
        return partial(made, partial(mixture, base, ByTask(), balance=balance), tmp_path)

    [plain] = fit(tmp_path / "plain", making(None), 1, **EXACT)
    [one] = fit(tmp_path / "one", making(balance), 1, **EXACT)
    two = fit(tmp_path / "two", making(balance), 2, **EXACT)
    assert_same(two, one, 1e-9)
    gap = {name: (tensor - plain["weights"][name]).abs().max() for name, tensor in one["weights"].items()}
    assert max(gap.values()) > 1e-6


@pytest.mark.parametrize("balance", [PCGrad(), Uncertainty()], ids=["pcgrad", "uncertainty"])
def test_a_sharded_base_balances_and_measures_as_a_whole_one(tmp_path: Path, base: str, balance: Balance) -> None:
    make = partial(made, partial(mixture, base, ByTask(), balance=balance), tmp_path)
    [one] = fit(tmp_path / "one", make, 1, LogConflicts(tmp_path / "one", 1), **EXACT)
    two = fit(tmp_path / "two", make, 2, LogConflicts(tmp_path / "two", 1), strategy=FSDP2Strategy, **EXACT)
    assert_same(two, one, 1e-9)
    told = [json.loads((tmp_path / name / "conflicts.json").read_text()) for name in ("one", "two")]
    assert len(told[0]["measured"]) == 3
    assert told[0] == told[1]


def assert_about(found: Tensor, expected: Tensor) -> None:
    """Equal up to float32, to which norms of the base round."""
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6 * float(expected.abs().max()))


class Watched(MixtureModule):
    """Keeps the gradients of the last step as the optimiser gets them."""

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        self.kept = {name: p.grad.clone() for name, p in self.mixture.named_adapter_parameters() if p.grad is not None}


def gradients(
    folder: Path, base: str, balance: Balance | None, batch_size: int = 4, **options: Any
) -> dict[str, Tensor]:
    """One step from the same random weights; what the optimiser got."""
    torch.manual_seed(0)
    experts = {name: LoRA(rank=2) for name in ("small", "large")}
    module = Watched(base, experts, LoRA(rank=2), ByTask(), balance=balance)
    module.configure_model()
    for parameter in module.roles():
        torch.nn.init.normal_(parameter, std=0.2)
    tasks = MixedTasks(base, toy.toy_tasks(folder, rows=(6, 6)), batch_size=batch_size)
    options = {"max_steps": 1, "limit_val_batches": 0, "precision": "64-true", **options}
    trainer(folder, **options).fit(module, datamodule=tasks)
    return module.kept


@pytest.mark.parametrize("balance", [PCGrad(), CAGrad(c=0.9), GradNorm()], ids=["pcgrad", "cagrad", "gradnorm"])
def test_gradients_of_experts_and_plain_sums_stay_what_they_are(tmp_path: Path, base: str, balance: Balance) -> None:
    plain, found = (gradients(tmp_path, base, method) for method in (None, balance))
    moved = {name for name in plain if not torch.allclose(found[name], plain[name], rtol=1e-9, atol=1e-12)}
    assert found.keys() == plain.keys()
    assert all("shared" in name for name in moved)
    assert bool(moved) == isinstance(balance, CAGrad | PCGrad)


@pytest.mark.parametrize("balance", [PCGrad(), CAGrad(c=0.9)], ids=["pcgrad", "cagrad"])
def test_accumulated_batches_are_combined_as_one(tmp_path: Path, base: str, balance: Balance) -> None:
    whole = gradients(tmp_path, base, balance, batch_size=4)
    parts = gradients(tmp_path, base, balance, batch_size=2, accumulate_grad_batches=2)
    for name in whole:
        assert_about(parts[name], whole[name])


def test_gradients_are_clipped_after_they_are_combined(tmp_path: Path, base: str) -> None:
    free = gradients(tmp_path, base, CAGrad(c=0.9))
    clipped = gradients(tmp_path, base, CAGrad(c=0.9), gradient_clip_val=1e-3)
    norm = torch.stack([gradient.norm() for gradient in free.values()]).norm()
    assert norm > 1e-3
    for name in free:
        torch.testing.assert_close(clipped[name], free[name] * (1e-3 / norm), rtol=1e-4, atol=1e-12)


def test_a_weight_multiplies_the_losses_of_its_rows(tmp_path: Path, base: str) -> None:
    plain = gradients(tmp_path, base, None)
    found = gradients(tmp_path, base, Fixed(weights={"small": 3.0, "large": 0.0}))
    for name in (name for name in plain if "expert" in name):
        small, large = plain[name].chunk(2)  # the first expert's rows, then the second's
        assert_about(found[name], torch.cat([3 * small, 0 * large]))


@pytest.mark.parametrize("balance", [PCGrad(), GradNorm()], ids=["pcgrad", "gradnorm"])
def test_half_precision_gives_about_the_same(tmp_path: Path, base: str, balance: Balance) -> None:
    exact = gradients(tmp_path, base, balance, precision="32-true")
    half = gradients(tmp_path, base, balance, precision="bf16-mixed")
    for name in (name for name in exact if "shared" in name):
        assert half[name].dtype == torch.float32
        assert (half[name] - exact[name]).norm() < 0.1 * exact[name].norm()


@over_methods
def test_the_state_of_balance_is_exact_whatever_the_module_is_cast_to(
    tmp_path: Path, base: str, balance: Balance
) -> None:
    if isinstance(balance, GradNorm):
        balance = GradNorm(learning_rate=1e-3)  # it follows signs, of which rounding turns some

    def state(precision: str) -> dict[str, Tensor]:
        torch.manual_seed(0)
        module = MixtureModule(base, None, LoRA(rank=2), balance=balance, optimization=FAST)
        tasks = MixedTasks(base, toy.toy_tasks(tmp_path, rows=(6, 6)), batch_size=4)
        trainer(tmp_path, max_steps=6, limit_val_batches=0, precision=precision).fit(module, datamodule=tasks)
        assert module.balancer is not None
        return {**module.balancer.state_dict(), "weights": module.balancer.weights().detach()}

    exact, half = state("32-true"), state("bf16-true")
    assert {name: tensor.dtype for name, tensor in half.items()} == {n: tensor.dtype for n, tensor in exact.items()}
    assert all(tensor.dtype in (torch.float64, torch.int64) for tensor in half.values())
    for name, tensor in half.items():
        torch.testing.assert_close(tensor, exact[name], rtol=2e-2, atol=2e-2)


@over_methods
def test_a_run_that_was_stopped_goes_on_as_if_it_was_not(
    tmp_path: Path, base: str, balance: Balance, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = runs.module

    def balanced(base: str) -> MixtureModule:
        module = plain(base)
        module.balance = balance
        return module

    monkeypatch.setattr(runs, "module", balanced)
    options = {"max_epochs": 2, "limit_val_batches": 0}
    whole, _ = runs.run(tmp_path / "whole", base, **options)
    stopped, _ = runs.run(tmp_path / "parts", base, at=("train", 4), **options)
    assert stopped is None
    parts, _ = runs.run(tmp_path / "parts", base, **options)
    assert all(torch.equal(parts[name], whole[name]) for name in whole)


@over_methods
def test_a_step_that_is_skipped_leaves_no_trace(tmp_path: Path, base: str, balance: Balance) -> None:
    torch.manual_seed(0)
    module = Spoiled(base, None, LoRA(rank=2), balance=balance)
    tasks = MixedTasks(base, toy.toy_tasks(tmp_path, rows=(6, 6)), batch_size=4)
    skip = SkipBadSteps(tmp_path / "bad")
    trainer(tmp_path, skip, max_steps=4, limit_val_batches=0).fit(module, datamodule=tasks)
    assert skip.skipped == 1
    assert module.balancer is not None
    assert all(
        tensor.isfinite().all() for tensor in [*module.balancer.state_dict().values(), module.balancer.weights()]
    )
    assert all(tensor.isfinite().all() for tensor in module.state_dict().values())


class Spoiled(MixtureModule):
    """Has losses that are no number in its second step."""

    def losses(self, batch: Any, *key: int) -> tuple[Tensor, Tensor]:
        found, counts = super().losses(batch, *key)
        return found * (float("nan") if self.trainer.global_step == 1 else 1.0), counts


def module(base: str, **options: Any) -> MixtureModule:
    return MixtureModule(base, balance=PCGrad(), optimization=Optimization(), **options)


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"experts": {"small": LoRA(), "large": LoRA()}, "router": ByTask()}, "shared adapter"),
        ({"experts": {"small": LoRA(), "large": LoRA()}, "shared": LoRA(), "router": Poly()}, "blends the parameters"),
    ],
)
def test_gradients_that_cannot_be_told_apart_are_refused(
    tmp_path: Path, base: str, options: dict[str, Any], word: str
) -> None:
    tasks = MixedTasks(base, toy.toy_tasks(tmp_path))
    with pytest.raises(ValueError, match=word):
        trainer(tmp_path, max_steps=1, limit_val_batches=0).fit(module(base, **options), datamodule=tasks)
