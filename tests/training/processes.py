"""Small fits on one process or several, and what came of them: gradients of every step and final weights."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor

from moadapt.training import MixedTasks
from moadapt.training.module import TaskModule
from tests.training.runs import trainer

Made = Callable[[], tuple[TaskModule, MixedTasks]]


class Record(Callback):
    """Notes what one process did, and writes it to a file of its own.

    Args:
        folder: Where the file goes.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.steps = folder, 0
        self.seen: dict[str, list[Any]] = {"tasks": [], "own": [], "gradients": [], "losses": []}

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, index: int) -> None:
        self.seen["tasks"].append(list(batch.task_names))

    def on_after_backward(self, trainer: Any, module: Any) -> None:
        """Note what this process alone found."""
        self.seen["own"].append({n: _kind(p.grad) for n, p in module.named_parameters() if p.requires_grad})

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, index: int) -> None:
        """Note the gradients that the step took."""
        self.seen["losses"].append(module.task_sums.tolist())
        if trainer.global_step > self.steps:
            self.steps = trainer.global_step
            found = {n: p.grad.clone() for n, p in module.named_parameters() if p.grad is not None}
            self.seen["gradients"].append(found)

    def on_fit_end(self, trainer: Any, module: Any) -> None:
        logged = {name: float(value) for name, value in trainer.callback_metrics.items()}
        file = self.folder / f"{trainer.global_rank}.pt"
        torch.save({**self.seen, "logged": logged, "weights": module.state_dict()}, file)


def _kind(gradient: Tensor | None) -> str:
    return "none" if gradient is None else "some" if bool(gradient.any()) else "zero"


def fit(
    folder: Path,
    made: Made,
    processes: int,
    *callbacks: Callback,
    strategy: type[DDPStrategy] = DDPStrategy,
    ckpt_path: Path | None = None,
    **options: Any,
) -> list[dict[str, Any]]:
    """Train, and return what each process did.

    Args:
        folder: Of this run.
        made: Makes module and data, the same whenever it is called.
        processes: How many.
        callbacks: What else is called.
        strategy: Of several processes.
        ckpt_path: What to go on from.
        options: Of the trainer.
    """
    folder.mkdir(exist_ok=True)
    module, data = made()
    several = {"strategy": strategy(start_method="fork"), "devices": processes} if processes > 1 else {}
    fresh = {"limit_val_batches": 0, "max_steps": 3, **several, **options}
    fitted = trainer(folder, *callbacks, Record(folder), **fresh)
    fitted.fit(module, datamodule=data, ckpt_path=ckpt_path, weights_only=True)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(processes)]


def randomized(module: TaskModule) -> TaskModule:
    """Give every trained parameter numbers, so that every gradient is there from the first step on."""
    module.configure_model()
    generator = torch.Generator().manual_seed(1)
    for parameter in module.roles():
        torch.nn.init.normal_(parameter, std=0.2, generator=generator)
    return module


def assert_same(several: Sequence[Mapping[str, Any]], one: Mapping[str, Any], tolerance: float) -> None:
    """Require of every process the losses, gradients and final weights of one process with the same batches."""
    assert len(one["gradients"]) > 1
    assert any(bool(tensor.any()) for tensor in one["gradients"][-1].values())
    for own in several:
        torch.testing.assert_close(own["losses"], one["losses"], rtol=tolerance, atol=0)
        torch.testing.assert_close(own["gradients"], one["gradients"], rtol=0, atol=tolerance)
        torch.testing.assert_close(own["weights"], one["weights"], rtol=0, atol=tolerance)
