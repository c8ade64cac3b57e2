"""Two processes that hold different tasks prune what one process prunes with the whole batch."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from moadapt.adapters import LoRA
from moadapt.ranks import Importance
from moadapt.training import MixedTasks, MixtureModule, Optimization, data
from moadapt_routers import ByTask
from tests.training import toy
from tests.training.runs import trainer
from tests.training.test_ddp import TaskByTask


class Kept(MixtureModule):
    """Writes what each process ended with."""

    folder = Path()

    def on_train_end(self) -> None:
        torch.save(self.state_dict(), self.folder / f"{self.trainer.world_size}-{self.global_rank}.pt")


def trained(folder: Path, base: str, processes: int) -> list[dict[str, Tensor]]:
    """Train six steps in float64 and return what every process has."""
    torch.manual_seed(0)
    experts = {name: LoRA(rank=2) for name in ("small", "large")}
    ranks = Importance(budget=0.5, start=0.1, settle=0.3, every=1)
    module = Kept(base, experts, LoRA(rank=2), ByTask(), optimization=Optimization(learning_rate=1e-2), ranks=ranks)
    module.folder = folder
    module.configure_model()
    for parameter in module.roles():
        torch.nn.init.normal_(parameter, std=0.2)
    tasks = MixedTasks(base, toy.toy_tasks(folder, rows=(6, 6)), batch_size=4)
    strategy = {"strategy": "ddp_fork", "devices": 2, "use_distributed_sampler": False} if processes == 2 else {}
    trainer(folder, max_steps=6, limit_val_batches=0, precision="64-true", **strategy).fit(module, datamodule=tasks)
    return [torch.load(folder / f"{processes}-{rank}.pt", weights_only=True) for rank in range(processes)]


def test_two_processes_keep_the_terms_that_one_keeps(
    tmp_path: Path, base: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data, "MixedOrder", TaskByTask)
    (one,) = trained(tmp_path, base, 1)
    two = trained(tmp_path, base, 2)
    assert all(torch.equal(two[0][name], two[1][name]) for name in one)
    up = [name for name in one if name.endswith("/up")]
    live = torch.cat([one[name].any(dim=1) for name in up])
    assert int(live.sum()) == len(live) // 2
    for name in one:
        torch.testing.assert_close(two[0][name], one[name], rtol=0, atol=1e-9)
