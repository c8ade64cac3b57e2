"""Norms of gradients by part, the warnings that follow from them, and a training that does not notice."""

import logging
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from lightning.pytorch import Callback
from torch import Tensor, nn

from moadapt.adapters import LoRA
from moadapt.placement import Placement
from moadapt.training import LogGradients, MixedTasks, MixtureModule, Optimization
from moadapt.training.gradient_log import gradient_norms
from moadapt_routers import ByTask, Constant, TopK
from tests.training import toy
from tests.training.runs import trainer

EXPERTS = {"small": LoRA(rank=2), "large": LoRA(rank=3)}
BOTH = Placement(towers=("vision", "language"))


def module(base: str, router: Any = None, shared: LoRA | None = LoRA(rank=2), **options: Any) -> MixtureModule:  # noqa: B008, a frozen value
    lightning.seed_everything(0, verbose=False)
    settings = Optimization(learning_rate=1e-2, warmup=0)
    made = MixtureModule(base, EXPERTS, shared, router or TopK(k=2), BOTH, optimization=settings, **options)
    made.configure_model()
    for _, parameter in made.mixture.named_adapter_parameters():
        nn.init.normal_(parameter, std=0.2)
    return made


def fit(folder: Path, base: str, made: MixtureModule, *callbacks: Callback, **options: Any) -> Any:
    data = MixedTasks(base, toy.toy_tasks(folder), batch_size=4)
    done = trainer(folder, *callbacks, **{"max_steps": 6, "limit_val_batches": 0, **options})
    done.fit(made, datamodule=data)
    return done


def test_norms_are_those_of_towers_kinds_and_adapters(base: str) -> None:
    made = module(base)
    expected: dict[str, list[Tensor]] = {}
    for site, bank in made.mixture.banks():
        stacked = bank.expert_rows()
        for name, parameter in bank.named_parameters():
            parameter.grad = torch.randn_like(parameter)
            kind = "expert" if name in stacked else "shared"
            expected.setdefault(f"{site.tower}/{kind}", []).append(parameter.grad.flatten())
            for index, expert in enumerate(EXPERTS):
                if name in stacked:
                    rows = parameter.grad[stacked[name] == index]
                    expected.setdefault(f"adapter/{expert}", []).append(rows.flatten())
            if name not in stacked:
                expected.setdefault("adapter/shared", []).append(parameter.grad.flatten())
    found = gradient_norms(made)  # routers have no gradient, and are left out
    assert found == {name: pytest.approx(float(torch.cat(parts).norm()), rel=1e-5) for name, parts in expected.items()}


class Norms(Callback):
    """Notes the norms that are logged, and those of what the optimiser gets, which nothing clips here."""

    def __init__(self) -> None:
        self.logged: list[float] = []
        self.seen: list[float] = []

    def on_train_batch_end(self, trainer: Any, module: Any, *rest: Any) -> None:
        found = {n: float(v) for n, v in trainer.callback_metrics.items() if n.startswith("gradient/adapter/")}
        self.logged.append(found.get("gradient/adapter/shared", 0.0))
        self.seen.append(gradient_norms(module)["adapter/shared"])


@pytest.mark.parametrize("accumulated", [1, 2])
def test_the_norms_of_steps_are_logged(tmp_path: Path, base: str, accumulated: int) -> None:
    watch = Norms()
    done = fit(tmp_path, base, module(base), LogGradients(1), watch, accumulate_grad_batches=accumulated, max_epochs=3)
    steps = slice(accumulated - 1, None, accumulated)
    assert watch.logged[steps] == pytest.approx(watch.seen[steps], rel=1e-5)
    assert {"gradient/vision/expert", "gradient/language/shared", "gradient/router"} <= set(done.callback_metrics)
    assert 0.5 <= float(done.callback_metrics["routing/top_share"]) <= 1


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_logging_changes_no_bit_of_the_training(tmp_path: Path, base: str, precision: str) -> None:
    found = []
    for callbacks in ([], [LogGradients(1, patience=1)]):
        made = module(base, TopK(k=2, noise=0.3))
        fit(tmp_path, base, made, *callbacks, precision=precision, gradient_clip_val=0.5)
        found.append({name: tensor.clone() for name, tensor in made.tensors().items()})
    assert all(torch.equal(found[1][name], tensor) for name, tensor in found[0].items())


class Spoil(Callback):
    """Scales the gradient of one kind of parameter from a step on."""

    def __init__(self, kind: str, factor: float, start: int = 0) -> None:
        self.kind, self.factor, self.start = kind, factor, start

    def on_before_optimizer_step(self, trainer: Any, module: Any, optimizer: Any) -> None:
        for parameter, role in module.roles().items():
            if role.kind == self.kind and parameter.grad is not None and trainer.global_step >= self.start:
                parameter.grad *= self.factor


def warned(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [
        each.getMessage() for each in caplog.records if each.levelno >= logging.WARNING and "gradient_log" in each.name
    ]


def test_a_healthy_training_is_not_warned_of(tmp_path: Path, base: str, caplog: pytest.LogCaptureFixture) -> None:
    fit(tmp_path, base, module(base), LogGradients(1, patience=2))
    assert not warned(caplog)


@pytest.mark.parametrize(
    ("spoiled", "told"),
    [
        (Spoil("shared", 1e-12), "gradients of language/shared were below 1e-08 in 3 readings"),
        (Spoil("shared", 1e5, start=5), "the gradient of vision/shared is"),
        (Spoil("expert", 0.0), "expert large got no gradient in 3 readings"),
    ],
)
def test_gradients_that_go_wrong_are_told(
    tmp_path: Path, base: str, caplog: pytest.LogCaptureFixture, spoiled: Spoil, told: str
) -> None:
    fit(tmp_path, base, module(base), spoiled, LogGradients(1, patience=3))
    assert sum(told in message for message in warned(caplog)) == 1


def test_a_router_that_collapsed_is_told(tmp_path: Path, base: str, caplog: pytest.LogCaptureFixture) -> None:
    made = module(base)
    with torch.no_grad():
        for name, parameter in made.mixture.routers.named_parameters():
            parameter.zero_()
            if parameter.ndim == 1:
                parameter += torch.tensor([50.0, 0.0])
            assert parameter.shape[0] == 2, name
    fit(tmp_path, base, made, LogGradients(1, patience=3))
    found = [message for message in warned(caplog) if "the router at" in message]
    assert len(found) == len(made.mixture.places)
    assert all("more than 99% of its weight to expert small in 3 readings" in message for message in found)


@pytest.mark.parametrize("router", [Constant(), ByTask()])
def test_routers_that_learn_nothing_are_not_judged(
    tmp_path: Path, base: str, caplog: pytest.LogCaptureFixture, router: Any
) -> None:
    done = fit(tmp_path, base, module(base, router), LogGradients(1, patience=1))
    assert "routing/top_share" not in done.callback_metrics
    assert not [message for message in warned(caplog) if "router at" in message]
