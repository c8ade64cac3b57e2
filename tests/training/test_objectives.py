"""The gradient of an objective is added once a step, whatever the processes and accumulated batches."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from moadapt.adapters import LoRA
from moadapt.objectives import Objective, Orthogonality
from moadapt.ranks import Importance
from moadapt.ranks.importance import ImportanceDriver
from moadapt.training import KeepLast, MixedTasks, MixtureModule, Optimization
from moadapt_routers import ByTask
from tests.training import toy
from tests.training.runs import trainer

APART = [Orthogonality(weight=3.0), Orthogonality(weight=2.0, measure="subspaces")]


class Recording(MixtureModule):
    """Keeps the gradients of the first step, and writes what was trained."""

    result = Path()

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        super().on_before_optimizer_step(optimizer)
        if self.global_step == 0:
            named = {name: p.grad.clone() for name, p in self.mixture.named_adapter_parameters() if p.grad is not None}
            self.first: dict[str, Tensor] = named
            self.values = [o.value(self.mixture).item() for o in self.objectives.values()]

    def on_train_end(self) -> None:
        if self.global_rank == 0:
            torch.save({"first": self.first, "end": dict(self.state_dict())}, self.result)


def made(base: str, objectives: list[Objective] | None) -> Recording:
    torch.manual_seed(0)
    experts = {name: LoRA(rank=2) for name in ("small", "large")}
    settings = Optimization(learning_rate=1e-2, warmup=0, schedule="constant")
    module = Recording(base, experts, LoRA(rank=2), ByTask(), objectives=objectives, optimization=settings)
    module.configure_model()
    for parameter in module.roles():
        torch.nn.init.normal_(parameter, std=0.2)
    return module


def trained(folder: Path, base: str, objectives: list[Objective] | None, rows: int = 4, **options: Any) -> Any:
    """Train in float64; return the first step's gradients, and the adapters at the end."""
    module = made(base, objectives)
    module.result = folder / "trained.pt"
    tasks = MixedTasks(base, toy.toy_tasks(folder, rows=(6, 6)), batch_size=rows)
    given = {"max_steps": 3, "limit_val_batches": 0, "precision": "64-true", **options}
    trainer(folder, **given).fit(module, datamodule=tasks)
    return torch.load(module.result, weights_only=True)


def test_its_gradient_joins_that_of_the_loss_once(tmp_path: Path, base: str) -> None:
    plain, apart = (trained(tmp_path, base, objectives, max_steps=1)["first"] for objectives in (None, APART))
    mixture = made(base, APART).mixture.double()
    parameters = dict(mixture.named_adapter_parameters())
    value = sum(objective.weight * objective.value(mixture) for objective in APART)
    gradients = torch.autograd.grad(value, list(parameters.values()))
    assert plain.keys() == apart.keys() == parameters.keys()
    for name, gradient in zip(parameters, gradients, strict=True):
        assert gradient.abs().max() > 1e-6
        torch.testing.assert_close(apart[name] - plain[name], gradient, rtol=0, atol=1e-10)


def assert_same(found: Any, expected: Any, atol: float) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=atol)


def test_accumulated_batches_train_as_one(tmp_path: Path, base: str) -> None:
    whole = trained(tmp_path, base, APART, max_steps=1, rows=12)
    parts = trained(tmp_path, base, APART, max_steps=1, rows=4, accumulate_grad_batches=3)
    # the base computes some things in float32, and other batches are padded otherwise
    assert_same(parts["first"], whole["first"], atol=1e-7)


def test_two_processes_train_as_one(tmp_path: Path, base: str) -> None:
    clipped = {"gradient_clip_val": 1.0}
    processes = {"strategy": "ddp_fork", "devices": 2, "use_distributed_sampler": False}
    one, two = (trained(tmp_path, base, APART, **clipped, **options) for options in ({}, processes))
    for part in ("first", "end"):
        assert_same(two[part], one[part], atol=1e-9)


def test_a_stopped_run_goes_on_as_without_the_stop(tmp_path: Path, base: str) -> None:
    def run(folder: Path, steps: int) -> dict[str, Tensor]:
        module, last = made(base, APART), folder / "last.ckpt"
        module.result = tmp_path / "end.pt"
        fit = trainer(folder, KeepLast(folder, every_n_steps=1), max_steps=steps, limit_val_batches=0)
        tasks = MixedTasks(base, toy.toy_tasks(tmp_path), batch_size=5)
        module.first = {}
        fit.fit(module, datamodule=tasks, ckpt_path=last if last.exists() else None, weights_only=True)
        return dict(module.state_dict())

    whole = run(tmp_path / "whole", 4)
    run(tmp_path / "parts", 2)
    parts = run(tmp_path / "parts", 4)
    assert all(torch.equal(parts[name], tensor) for name, tensor in whole.items())


def test_values_are_logged_unweighted_and_weight_0_only_measures(tmp_path: Path, base: str) -> None:
    measured = [Orthogonality(weight=0.0), Orthogonality(weight=0.0, measure="subspaces")]
    module = made(base, measured)
    module.result = tmp_path / "end.pt"
    fit = trainer(tmp_path, max_steps=1, limit_val_batches=0, precision="64-true")
    fit.fit(module, datamodule=MixedTasks(base, toy.toy_tasks(tmp_path, rows=(6, 6)), batch_size=4))
    logged = [fit.callback_metrics[f"objective/{name}"].item() for name in ("orthogonality", "orthogonality_2")]
    assert logged == pytest.approx(module.values)
    plain = trained(tmp_path, base, None, max_steps=1)
    assert all(torch.equal(module.first[name], gradient) for name, gradient in plain["first"].items())


class Apart(MixtureModule):
    """Uses both experts in its first step, then small alone; notes large and its scores after every step."""

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        if self.global_step:
            for _, bank in self.mixture.banks():
                for name, rows in bank.expert_rows().items():
                    gradient = bank.get_parameter(name).grad
                    assert gradient is not None
                    gradient[rows == 1] = 0.0
        super().on_before_optimizer_step(optimizer)

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        assert isinstance(self._driver, ImportanceDriver)
        own = {f"{name}/{site.path}/{part}": t for site, bank in self.mixture.banks() for name in bank.names
               for part, t in bank.state(name).items()}  # fmt: skip
        scores = {name: terms.scores()[terms.owner.cpu() == 1] for name, terms in self._driver.terms.items()
                  if name.endswith("/expert")}  # fmt: skip
        self.seen = [*getattr(self, "seen", ()), {name: t.detach().clone() for name, t in (own | scores).items()}]


@pytest.mark.parametrize("weight", [1e-6, 1.0])
def test_an_expert_that_no_row_used_stays_and_keeps_its_scores(tmp_path: Path, base: str, weight: float) -> None:
    experts = {name: LoRA(rank=2) for name in ("small", "large")}
    settings = Optimization(learning_rate=1e-2, warmup=0, schedule="constant", weight_decay=0.5)
    ranks = Importance(budget=1.0)
    apart: list[Objective] = [Orthogonality(weight=weight, measure="subspaces")]
    module = Apart(base, experts, None, ByTask(), objectives=apart, optimization=settings, ranks=ranks)
    module.configure_model()
    for parameter in module.roles():
        torch.nn.init.normal_(parameter, std=0.2)
    fit = trainer(tmp_path, max_steps=3, limit_val_batches=0)
    fit.fit(module, datamodule=MixedTasks(base, toy.toy_tasks(tmp_path, rows=(6, 6)), batch_size=6))
    first, *_, last = module.seen
    unused = [name for name in last if not name.startswith("small/")]
    assert any(name.endswith("/expert") and last[name].any() for name in unused)
    assert all(torch.equal(last[name], first[name]) for name in unused)
    assert not any(torch.equal(last[name], first[name]) for name in last if name.startswith("small/"))
