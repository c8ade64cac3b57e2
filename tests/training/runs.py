"""Small training runs that can be stopped anywhere, and what they did."""

import os
import signal
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning
from lightning.pytorch import Callback

from moadapt.adapters import LoRA
from moadapt.router import RouterSpec
from moadapt.sampling import Sampler
from moadapt.training import KeepLast, MixedTasks, MixtureModule, Optimization, Stopped
from moadapt_routers import ByTask
from tests.training import toy


@dataclass
class Watch(Callback):
    """Notes what is trained and validated, and sends a signal at one moment.

    Args:
        at: When: `("train", steps done)` or `("validation", batches done)`.
    """

    at: tuple[str, int] | None = None
    trained: list[tuple[int, ...]] = field(default_factory=list)
    validated: list[int] = field(default_factory=list)
    ended: int = 0
    checked: int = 0
    announce: bool = False

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, index: int) -> None:
        self.trained.append((trainer.global_step, trainer.current_epoch, batch.step, *batch.rows.tolist()))
        if self.announce:
            print("step", trainer.global_step, flush=True)
        self._fire("train", trainer.global_step)

    def on_validation_batch_start(self, trainer: Any, module: Any, *rest: Any) -> None:
        self._fire("validation", self.checked)
        self.checked += 1

    def on_validation_end(self, trainer: Any, module: Any) -> None:
        self.validated.append(trainer.global_step)

    def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
        self.ended += 1

    def _fire(self, where: str, count: int) -> None:
        if self.at == (where, count):
            self.at = None  # a second signal would act at once
            os.kill(os.getpid(), signal.SIGINT)


def module(base: str, router: RouterSpec | None = None, dropout: float = 0.2) -> MixtureModule:
    experts = {"small": LoRA(rank=2, dropout=dropout), "large": LoRA(rank=2, dropout=dropout)}
    settings = Optimization(learning_rate=1e-2, router_learning_rate=1e-3)
    return MixtureModule(base, experts, LoRA(rank=1, dropout=dropout), router or ByTask(), optimization=settings)


def trainer(folder: Path, *callbacks: Callback, **options: Any) -> lightning.Trainer:
    """A quiet trainer on the CPU."""
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "accelerator": "cpu",
    }
    return lightning.Trainer(default_root_dir=folder, callbacks=list(callbacks), **{**quiet, **options})


def run(
    folder: Path,
    base: str,
    at: tuple[str, int] | None = None,
    workers: int = 0,
    announce: bool = False,
    sampling: Sampler | None = None,
    **options: Any,
) -> tuple[Any, Watch]:
    """Train, from `last.ckpt` where there is one; return the tensors, or None where it was stopped."""
    lightning.seed_everything(0, verbose=False)
    data = MixedTasks(base, toy.toy_tasks(folder.parent), batch_size=3, num_workers=workers, sampling=sampling)
    watch, last = Watch(at, announce=announce), folder / "last.ckpt"
    made = module(base)
    try:
        fit = trainer(folder, watch, KeepLast(folder, every_n_steps=1000), **options)
        fit.fit(made, datamodule=data, ckpt_path=last if last.exists() else None, weights_only=True)
    except Stopped as stop:
        if stop.file != last:
            raise
        return None, watch
    return {name: tensor.clone() for name, tensor in made.state_dict().items()}, watch
