"""Routing is measured at validation, on prompts alone, the same over any number of processes."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from moadapt.adapters import LoRA
from moadapt.measures import Load, TaskLoad
from moadapt.objectives import TaskCrossEntropy
from moadapt.placement import Placement
from moadapt.registry import ROUTERS
from moadapt.routed import routed_at, with_tasks
from moadapt.router import RouterSpec
from moadapt.training import MixedTasks, MixtureModule
from moadapt.training.routing_log import FILE, LogRouting
from moadapt_routers import ByTask, Switch, TopK
from tests.training import toy
from tests.training.runs import trainer

EVERYWHERE = Placement(towers=("vision", "language"))
TOKENS = TopK(k=1, scope="token", per="layer")


def validated(folder: Path, base: str, router: RouterSpec | None, epochs: int = 1, **options: Any) -> Any:
    """Train an epoch or more with a validation each; return module, data, what was logged and what was written."""
    torch.manual_seed(0)
    experts = None if router is None else {name: LoRA(rank=2, placement=EVERYWHERE) for name in ("small", "large")}
    taught = None if router is None or router.taught_by_loss else [TaskCrossEntropy()]
    module = MixtureModule(base, experts, LoRA(rank=1), router, objectives=taught)
    data = MixedTasks(base, toy.toy_tasks(folder), batch_size=4)
    fit = trainer(folder, LogRouting(folder / "run"), max_epochs=epochs, limit_train_batches=1, **options)
    fit.fit(module, datamodule=data)
    file = folder / "run" / FILE
    logged = {name: value.item() for name, value in fit.callback_metrics.items() if name.startswith("routing/")}
    return module, data, logged, json.loads(file.read_text()) if file.exists() else None


@pytest.mark.parametrize("router", [TOKENS, TopK(k=2, per="layer"), ByTask()], ids=["token", "sequence", "task"])
def test_what_is_written_is_the_routing_of_the_prompts(tmp_path: Path, base: str, router: RouterSpec) -> None:
    module, data, logged, written = validated(tmp_path, base, router)
    mixture, tasks = module.mixture.eval(), tuple(data.tasks)
    load = {place.name: Load(2) for place in mixture.places}
    by_task = {place.name: TaskLoad(2, 2) for place in mixture.places}
    for batch in data.val_dataloader():
        with torch.no_grad(), mixture.observe() as observed:
            mixture(**batch.inputs, task=batch.task_names)
        for each in observed:
            routed = routed_at(with_tasks(each, batch.task_ids(tasks)), mixture.experts, tasks)
            load[each.place].update(routed)
            by_task[each.place].update(routed)
    assert written["places"].keys() == load.keys()
    for place, found in written["places"].items():
        assert found["load"] == pytest.approx(load[place].compute().tolist(), abs=1e-5)
        assert torch.tensor(found["load_by_task"]) == pytest.approx(by_task[place].compute(), abs=1e-5)
        assert logged[f"routing/{place}/entropy"] == pytest.approx(found["entropy"], abs=1e-5)
    assert (written["step"], written["experts"], written["tasks"]) == (1, ["small", "large"], ["small", "large"])
    assert logged["routing/entropy"] == pytest.approx(written["means"]["entropy"], abs=1e-5)
    assert 0 <= logged["routing/task_information"] <= math.log(2) + 1e-6
    assert "routing/drift" not in logged


@pytest.mark.parametrize("name", [name for name, router in ROUTERS if not router().fits_from])
def test_every_router_is_measured(tmp_path: Path, base: str, name: str) -> None:
    *_, logged, written = validated(tmp_path, base, ROUTERS.get(name)(), epochs=2)
    for found in written["places"].values():
        assert sum(found["load"]) == pytest.approx(1, abs=1e-4)
        assert 1 - 1e-4 <= found["effective_experts"] <= 2 + 1e-4
    assert {"entropy", "input_information", "task_information", "dropped", "drift"} <= written["means"].keys()
    assert all(math.isfinite(value) for value in logged.values())


def test_drift_is_measured_from_the_second_validation_on(tmp_path: Path, base: str) -> None:
    *_, logged, written = validated(tmp_path, base, TOKENS, epochs=2)
    assert 0 <= logged["routing/drift"] <= 1
    assert all(found["drift"] is not None for found in written["places"].values())


@pytest.mark.filterwarnings("ignore:It is recommended to use")
def test_processes_change_nothing(tmp_path: Path, base: str) -> None:
    *_, one = validated(tmp_path, base, TOKENS)
    two = {"strategy": "ddp_fork", "devices": 2, "use_distributed_sampler": False}
    (tmp_path / "run" / FILE).unlink()
    *_, other = validated(tmp_path, base, TOKENS, **two)
    for place, expected in one["places"].items():
        for name in ("load", "entropy", "effective_experts"):
            assert other["places"][place][name] == pytest.approx(expected[name], abs=2e-3), (place, name)


def test_nothing_is_written_without_a_router(tmp_path: Path, base: str) -> None:
    *_, logged, written = validated(tmp_path, base, None)
    assert (logged, written) == ({}, None)


def test_routers_are_not_watched_after_a_failure(tmp_path: Path, base: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*given: Any) -> None:
        raise ArithmeticError("the battery is empty")

    monkeypatch.setattr(MixtureModule, "validation_step", fail)
    module = MixtureModule(base, {name: LoRA(rank=2) for name in ("small", "large")}, None, ByTask())
    fit = trainer(tmp_path, LogRouting(tmp_path / "run"), max_epochs=1, limit_train_batches=1)
    with pytest.raises(ArithmeticError):
        fit.fit(module, datamodule=MixedTasks(base, toy.toy_tasks(tmp_path), batch_size=4))
    assert module.mixture.context.observers == []


@pytest.mark.parametrize(("router", "drops"), [(Switch(scope="token", capacity=0.5), True), (Switch(), False)])
def test_what_training_drops_is_logged(tmp_path: Path, base: str, router: Switch, drops: bool) -> None:
    torch.manual_seed(0)
    module = MixtureModule(base, {name: LoRA(rank=2) for name in ("small", "large")}, LoRA(rank=2), router)
    data = MixedTasks(base, toy.toy_tasks(tmp_path, rows=(6, 6)), batch_size=4)
    fit = trainer(tmp_path, LogRouting(tmp_path), max_steps=2, limit_val_batches=0, log_every_n_steps=1)
    fit.fit(module, datamodule=data)
    dropped = float(fit.callback_metrics["routing/dropped_in_training"])
    assert (0.05 < dropped < 1) if drops else dropped == 0
