"""Stops a task early: where its validation score no longer rises, its expert stands still and the run may end.

An expert that bears the name of a task is held where it is once the task has stopped: its gradients are zero from then
on, and `ExpertAdamW` leaves such experts alone. Shared adapter, routers and other experts go on, and so do the rows of
the task. When all tasks have stopped, the run ends.
"""

import logging
import math
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from moadapt.training.module import TaskModule

_LOG = logging.getLogger(__name__)


class StopTasks(Callback):
    """Stops tasks whose score stopped rising.

    It compares `<task>/<primary>`, the score that each task is judged by, after each validation.

    Args:
        patience: How many validations in a row may bring nothing better, at least 1.
        min_delta: By how much a score must rise to count as better, at least 0.

    Raises:
        ValueError: A number is out of range.
    """

    def __init__(self, patience: int = 3, min_delta: float = 0.0) -> None:
        if patience < 1 or min_delta < 0:
            raise ValueError(f"StopTasks got patience={patience}, min_delta={min_delta}; need at least 1, and 0")
        self.patience, self.min_delta = patience, min_delta
        self.best: dict[str, float] = {}
        self.waited: dict[str, int] = {}
        self.stopped: dict[str, int] = {}
        """Tasks that have stopped, with the step at which they did."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """End a run at once that has nothing left to train."""
        if isinstance(pl_module, TaskModule):
            self._end(trainer, pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Judge every task that was scored, on the first process for all."""
        if trainer.sanity_checking or not isinstance(pl_module, TaskModule):
            return
        for name, task in pl_module.data.tasks.items():
            score = trainer.callback_metrics.get(f"{name}/{task.primary}")
            if name not in self.stopped and score is not None:
                self._judge(name, trainer.strategy.broadcast(float(score)), trainer)
        self._end(trainer, pl_module)

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Zero the gradients of the experts whose task has stopped."""
        if not self.stopped or not isinstance(pl_module, TaskModule):
            return
        held = [index for index, name in enumerate(pl_module.expert_names()) if name in self.stopped]
        for stack in pl_module.stacks() if held else []:
            for parameter, owners in stack.items():
                if parameter.grad is not None:
                    rows = torch.isin(owners, owners.new_tensor(held)).to(parameter.grad.device)
                    parameter.grad[rows] = 0

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs."""
        return {"best": self.best, "waited": self.waited, "stopped": self.stopped}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from there."""
        self.best, self.waited, self.stopped = (dict(state_dict[name]) for name in ("best", "waited", "stopped"))

    def _end(self, trainer: Trainer, module: TaskModule) -> None:
        if set(self.stopped) >= set(module.data.tasks):
            trainer.should_stop = True

    def _judge(self, name: str, score: float, trainer: Trainer) -> None:
        if not math.isnan(score) and score > self.best.get(name, -math.inf) + self.min_delta:
            self.best[name], self.waited[name] = score, 0
            return
        self.waited[name] = self.waited.get(name, 0) + 1
        if self.waited[name] >= self.patience:
            self.stopped[name] = trainer.global_step
            if trainer.is_global_zero:
                told = "task %s has stopped at step %d: no score above %.4g in %d validations"
                _LOG.warning(told, name, trainer.global_step, self.best.get(name, -math.inf), self.waited[name])
