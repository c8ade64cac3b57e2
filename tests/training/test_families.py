"""Every adapter family trains through the Lightning module, alone and one expert a task, and resumes bit for bit."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from moadapt.adapters import FamilySpec
from moadapt.registry import FAMILIES
from moadapt.training import KeepLast, MixedTasks, MixtureModule, Optimization
from moadapt_routers import ByTask
from tests.conformance.canonical import VISION
from tests.training import toy
from tests.training.runs import trainer


@pytest.mark.parametrize("by_task", [False, True], ids=["shared", "experts"])
@pytest.mark.parametrize("family", [pytest.param(family, id=name) for name, family in FAMILIES])
def test_a_family_trains(family: type[FamilySpec], by_task: bool, base: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    adapters: dict[str, Any] = {"shared": family()}
    if by_task:
        adapters = {"experts": {name: family() for name in ("small", "large")}, "router": ByTask()}
    where = None if family.causal else VISION
    module = MixtureModule(base, **adapters, placement=where, optimization=Optimization(learning_rate=5e-2, warmup=0))
    module.configure_model()
    before = {name: tensor.clone() for name, tensor in module.tensors().items()}
    tasks = MixedTasks(base, toy.toy_tasks(tmp_path, rows=(6, 6)), batch_size=4, eval_batch_size=4)
    fit = trainer(tmp_path, max_steps=3)
    fit.fit(module, datamodule=tasks)
    moved = {name.split("/")[1] for name, tensor in module.tensors().items() if not torch.equal(tensor, before[name])}
    assert moved == {name.split("/")[1] for name in before}
    assert fit.callback_metrics["loss"].isfinite()
    assert 0 <= fit.callback_metrics["score"] <= 1  # validation generated and scored answers


@pytest.mark.parametrize("family", [pytest.param(family, id=name) for name, family in FAMILIES])
def test_a_family_resumes_as_if_never_stopped(family: type[FamilySpec], base: str, tmp_path: Path) -> None:
    tasks = toy.toy_tasks(tmp_path, rows=(6, 6))

    def run(steps: int, folder: str, resumes: bool = False) -> dict[str, Tensor]:
        torch.manual_seed(0)
        experts = {name: family() for name in ("small", "large")}
        settings = Optimization(learning_rate=5e-2, warmup=0, schedule="constant")
        where = None if family.causal else VISION
        module = MixtureModule(base, experts, family(), ByTask(), where, optimization=settings)
        last = tmp_path / folder / "last.ckpt"
        fit = trainer(tmp_path / folder, KeepLast(last.parent, every_n_steps=2), max_steps=steps, limit_val_batches=0)
        data = MixedTasks(base, tasks, batch_size=4)
        fit.fit(module, datamodule=data, ckpt_path=last if resumes else None, weights_only=True)
        return {name: tensor.clone() for name, tensor in module.tensors().items()}

    whole, half = run(4, "whole"), run(2, "parts")
    resumed = run(4, "parts", resumes=True)
    assert whole.keys() == resumed.keys()
    assert any(not torch.equal(whole[name], half[name]) for name in whole)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
