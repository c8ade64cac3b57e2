"""Two processes that hold different tasks train what one process trains with the whole batch."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from moadapt.adapters import LoRA
from moadapt.objectives import LoadBalance
from moadapt.router import RouterSpec
from moadapt.training import MixedTasks, MixtureModule, Optimization, data
from moadapt.training.order import Draw, MixedOrder
from moadapt_routers import ByTask, Poly, TopK
from tests.training import toy
from tests.training.runs import trainer


class TaskByTask(MixedOrder):
    """The same batches, sorted: with equally many rows each process gets one of the two tasks."""

    def batch(self, epoch: int, step: int) -> list[Draw]:
        return sorted(super().batch(epoch, step), key=lambda draw: draw.row)


class Recording(MixtureModule):
    """Checks which tasks this process holds."""

    alone = False
    result = Path()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        held = set(batch.task_names)
        assert held == ({"small", "large"} if self.alone else {["small", "large"][self.global_rank]})
        return super().training_step(batch, batch_idx)

    def on_train_end(self) -> None:
        if self.global_rank == 0:
            torch.save(self.state_dict(), self.result)


def trained(folder: Path, base: str, processes: int, router: RouterSpec | None, **options: Any) -> dict[str, Tensor]:
    """Train three steps in float64 and return adapters and routers."""
    torch.manual_seed(0)
    experts = {name: LoRA(rank=2) for name in ("small", "large")} if router else None
    objectives = [LoadBalance()] if router == TopK(k=1) else None  # nothing else teaches it
    options = {"objectives": objectives, **options}
    module = Recording(base, experts, LoRA(rank=2), router, optimization=Optimization(learning_rate=1e-2), **options)
    module.alone, module.result = processes == 1, folder / f"{processes}.pt"
    module.configure_model()
    for parameter in module.roles():  # so that every gradient is there from the first step on
        torch.nn.init.normal_(parameter, std=0.2)
    tasks = MixedTasks(base, toy.toy_tasks(folder, rows=(6, 6)), batch_size=4)
    strategy = {"strategy": "ddp_fork", "devices": 2, "use_distributed_sampler": False} if processes == 2 else {}
    fit = trainer(folder, max_steps=3, limit_val_batches=0, precision="64-true", gradient_clip_val=1.0, **strategy)
    fit.fit(module, datamodule=tasks)
    trained: dict[str, Tensor] = torch.load(module.result, weights_only=True)
    return trained


@pytest.mark.parametrize("checkpointing", [False, True], ids=["stored", "checkpointed"])
@pytest.mark.parametrize(
    "router",
    [ByTask(), TopK(k=1), TopK(k=2, scope="token"), Poly(heads=2), None],
    ids=["task", "top1", "top2", "skills", "shared"],
)
def test_two_processes_with_different_tasks_train_as_one(
    tmp_path: Path, base: str, router: RouterSpec | None, checkpointing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data, "MixedOrder", TaskByTask)
    one = trained(tmp_path, base, 1, router, gradient_checkpointing=checkpointing)
    two = trained(tmp_path, base, 2, router, gradient_checkpointing=checkpointing)
    assert one.keys() == two.keys()
    for name in one:
        # routers and pooled features are float32 by design; everything else is float64
        torch.testing.assert_close(
            two[name], one[name], rtol=0, atol=1e-9 if isinstance(router, ByTask | None) else 1e-6
        )
