"""Logs how tasks oppose each other in the shared adapter: cosines of their gradients, and a picture."""

import json
import logging
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch import Callback, LightningModule, Trainer

from moadapt.reporting.conflicts import conflict_picture
from moadapt.training.batch import Batch
from moadapt.training.mixture_module import MixtureModule
from moadapt.training.task_gradients import TaskGradients, cosines
from moadapt.whole_files import write_whole

FILE = "conflicts.json"
_LOG = logging.getLogger(__name__)
_DIGITS = 4


class LogConflicts(Callback):
    """Measures the cosines between the gradients that tasks have for the shared adapter, and leaves the training alone.

    Logs `conflict/mean` and `conflict/lowest` over the pairs of tasks that the step's first batch holds, on all
    processes together; writes all matrices to `conflicts.json`, and draws `conflicts.png` at each validation and at the
    end. Each measurement takes one more pass forward and back. Where gradients cannot be told task by task it says so
    once and does nothing more.

    Args:
        folder: Where they go, made if need be.
        every_n_steps: Steps between two measurements, 1 or more.

    Raises:
        ValueError: The number of steps is below 1.
    """

    def __init__(self, folder: str | Path, every_n_steps: int = 100) -> None:
        if every_n_steps < 1:
            raise ValueError(f"LogConflicts got every_n_steps={every_n_steps}; give 1 or more")
        self.folder, self.every_n_steps = Path(folder), every_n_steps
        self._found: list[dict[str, Any]] = []
        self._step = -1
        self._able = True

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take up what an earlier part of the run measured."""
        self._able, self._step = isinstance(pl_module, MixtureModule), -1
        file = self.folder / FILE
        before = json.loads(file.read_text())["measured"] if trainer.global_step and file.is_file() else []
        self._found = [each for each in before if each["step"] < trainer.global_step]

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Batch, batch_idx: int) -> None:
        """Measure before a step where it is time; of accumulated batches the first counts."""
        step = trainer.global_step
        if not self._able or step == self._step or step % self.every_n_steps:
            return
        assert isinstance(pl_module, MixtureModule), "see on_train_start"
        self._step = step
        gradients, reason = _of_process(pl_module, batch)
        self._able = trainer.strategy.reduce_boolean_decision(gradients is not None, all=True)
        if not self._able or gradients is None:
            _LOG.info("how tasks oppose each other is not logged: %s", reason or "another process cannot tell")
            return
        products = gradients.sum_up(partial(trainer.strategy.reduce, reduce_op="sum"))
        gradients.clear()
        self._tell(trainer, tuple(pl_module.data.tasks), cosines(products).numpy())

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw what was measured."""
        self._draw(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw what was measured."""
        self._draw(trainer)

    def _tell(self, trainer: Trainer, tasks: tuple[str, ...], found: Any) -> None:
        """Log and write one measurement, on the first process."""
        pairs = found[np.triu_indices(len(tasks), k=1)]
        pairs = pairs[~np.isnan(pairs)]
        if not trainer.is_global_zero or not len(pairs):
            return
        for logger in trainer.loggers:
            numbers = {"conflict/mean": float(pairs.mean()), "conflict/lowest": float(pairs.min())}
            logger.log_metrics(numbers, step=trainer.global_step)
        rows = [[None if np.isnan(value) else round(value, _DIGITS) for value in row] for row in found.tolist()]
        self._found.append({"step": trainer.global_step, "cosines": rows})
        self.folder.mkdir(parents=True, exist_ok=True)
        told = {"tasks": list(tasks), "measured": self._found}
        write_whole(self.folder / FILE, (json.dumps(told) + "\n").encode())

    def _draw(self, trainer: Trainer) -> None:
        if trainer.is_global_zero and self._found:
            tasks = json.loads((self.folder / FILE).read_text())["tasks"]
            matrices = np.array([each["cosines"] for each in self._found], dtype=np.float64)
            picture = conflict_picture(tasks, [each["step"] for each in self._found], matrices)
            picture.savefig(self.folder / "conflicts.png", dpi=110)


def _of_process(module: MixtureModule, batch: Batch) -> tuple[TaskGradients | None, str]:
    """Return the gradients of this process, or why there are none; other processes wait to be told which."""
    try:
        return module.task_gradients(batch), ""
    except ValueError as error:
        return None, str(error)
