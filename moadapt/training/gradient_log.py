"""Logs how large gradients are, part by part, and warns where training goes wrong, with what to do about it.

Gradients are read when those of all processes are in them and before they are clipped, so every process has the same
numbers and none waits for another. What stands still or has no gradient is left out. Reading changes nothing.
"""

import logging
import math
from collections import defaultdict
from collections.abc import Iterable
from contextlib import ExitStack
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from moadapt import measures
from moadapt.names import SHARED
from moadapt.routed import routed_at
from moadapt.tracing import Observation
from moadapt.training.batch import Batch
from moadapt.training.mixture_module import MixtureModule
from moadapt.training.module import TaskModule
from moadapt.training.roles import ROUTER
from moadapt.training.stopping import StopTasks

_LOG = logging.getLogger(__name__)
_TINY, _HUGE, _ALONE = 1e-8, 100.0, 0.99
_VANISHING = (
    "gradients of {what} were below {limit:g} in {count} readings; see whether anything reads these sites (`moadapt "
    "inspect`), whether their gates are shut, and, with 16-bit numbers, whether they are rounded to zero"
)
_EXPLODING = (
    "the gradient of {what} is {size:.3g}, {limit:g} times what it was on average; lower its learning rate, lengthen "
    "the warm-up, or clip more (trainer.gradient_clip_val)"
)
_DEAD = (
    "expert {what} got no gradient in {count} readings, so it learns nothing; give the router the objective "
    "load_balance or more noise, let the router wait (optimization.unfreezing), or draw its task more often "
    "(data.sampling)"
)
_COLLAPSED = (
    "the router at {what} gave more than {limit:.0%} of its weight to expert {expert} in {count} readings; give it the "
    "objective load_balance or a higher weight of it, a lower router_learning_rate, or let it wait "
    "(optimization.unfreezing)"
)


class LogGradients(Callback):
    """Logs norms of gradients and warns of those that vanish or explode, of dead experts and collapsed routers.

    Logs `gradient/<tower>/<kind>`, `gradient/router` and `gradient/adapter/<name>`; of learned routers
    `routing/top_share`, the mean over places of the share that the most used expert has.

    Args:
        every_n_steps: Steps between two readings, at least 1; None takes the trainer's `log_every_n_steps`.
        patience: How many readings in a row must look wrong before a warning, at least 1.

    Raises:
        ValueError: A number is out of range.
    """

    def __init__(self, every_n_steps: int | None = None, patience: int = 20) -> None:
        if patience < 1 or (every_n_steps is not None and every_n_steps < 1):
            raise ValueError(f"LogGradients got every_n_steps={every_n_steps}, patience={patience}; need at least 1")
        self.every_n_steps, self.patience = every_n_steps, patience
        self._due = False
        self._read: dict[str, float] = {}
        self._wrong: dict[str, int] = defaultdict(int)
        self._usual: dict[str, tuple[float, int]] = {}
        self._watching = ExitStack()
        self._loads: dict[str, Tensor] = {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Read gradients from now on."""
        if isinstance(pl_module, TaskModule):
            pl_module.on_gradients = lambda: self._look(trainer, pl_module)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Batch, batch_idx: int) -> None:
        """Watch learned routers in a step that is read."""
        every = self.every_n_steps or trainer.log_every_n_steps  # type: ignore[attr-defined]
        self._due, self._loads = bool(every) and trainer.global_step % every == 0, {}
        if self._due and isinstance(pl_module, MixtureModule) and _learned(pl_module):
            self._watching.enter_context(pl_module.mixture.watch(self._note))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        """Log what was read."""
        self._watching.close()
        if self._loads and isinstance(pl_module, MixtureModule):
            self._judge_routers(trainer, pl_module)
        pl_module.log_dict(self._read)
        self._read = {}

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Stop watching."""
        self._watching.close()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Stop reading."""
        if isinstance(pl_module, TaskModule):
            pl_module.on_gradients = None

    def _look(self, trainer: Trainer, module: TaskModule) -> None:
        """Read the gradients of a step."""
        if not self._due:
            return
        norms = gradient_norms(module)
        if not all(map(math.isfinite, norms.values())):
            return  # such a step is skipped
        self._read |= {f"gradient/{name}": norm for name, norm in norms.items()}
        stopped = {name for each in trainer.callbacks if isinstance(each, StopTasks) for name in each.stopped}  # type: ignore[attr-defined]
        for name, norm in norms.items():
            kind, _, adapter = name.partition("/")
            if kind != "adapter":
                self._judge(name, norm, trainer)
            elif adapter != SHARED and adapter not in stopped:
                self._count(f"dead {adapter}", norm == 0, _DEAD.format(what=adapter, count=self.patience), trainer)

    def _judge(self, name: str, norm: float, trainer: Trainer) -> None:
        """Warn of gradients that vanish, or are far beyond their geometric mean so far."""
        told = _VANISHING.format(what=name, limit=_TINY, count=self.patience)
        self._count(f"vanishing {name}", norm < _TINY, told, trainer)
        mean, count = self._usual.get(name, (0.0, 0))
        if norm < _TINY:
            return
        explodes = count >= self.patience and math.log(norm) > mean + math.log(_HUGE)
        if explodes and trainer.is_global_zero:
            _LOG.warning(_EXPLODING.format(what=name, size=norm, limit=_HUGE))
        if not explodes:
            self._usual[name] = mean + (math.log(norm) - mean) / (count + 1), count + 1

    def _judge_routers(self, trainer: Trainer, module: MixtureModule) -> None:
        """Log the greatest shares, over all processes, and warn of routers that use one expert alone."""
        loads = torch.stack(list(self._loads.values()))
        loads = trainer.strategy.reduce(loads, reduce_op="sum")
        shares = (loads / loads.sum(dim=1, keepdim=True).clamp(min=1e-12)).cpu()
        top, expert = shares.max(dim=1)
        self._read["routing/top_share"] = float(top.mean())
        for place, share, index in zip(self._loads, top.tolist(), expert.tolist(), strict=True):
            name = module.mixture.experts[index]
            told = _COLLAPSED.format(what=place, limit=_ALONE, expert=name, count=self.patience)
            self._count(f"collapsed {place}", share > _ALONE, told, trainer)

    def _note(self, observed: Observation) -> None:
        shares = measures.row_shares(routed_at(observed, (), ()), len(observed.routing.weights)).detach()
        load = shares.nan_to_num().sum(dim=0)
        self._loads[observed.place] = load + self._loads[observed.place] if observed.place in self._loads else load

    def _count(self, what: str, wrong: bool, told: str, trainer: Trainer) -> None:
        """Warn once where something was wrong often enough in a row."""
        self._wrong[what] = self._wrong[what] + 1 if wrong else 0
        if self._wrong[what] == self.patience and trainer.is_global_zero:
            _LOG.warning(told)


def gradient_norms(module: TaskModule) -> dict[str, float]:
    """Return the norm of the gradient of every part that has one; one transfer from the device in all.

    Args:
        module: Its parameters' gradients are read: by tower and kind, of all routers, and by adapter.
    """
    squares: dict[str, list[Tensor]] = defaultdict(list)
    stacks = {parameter: rows for stack in module.stacks() for parameter, rows in stack.items()}
    names = module.expert_names()
    for parameter, role in module.roles().items():
        if parameter.grad is None:
            continue
        square = parameter.grad.detach().float().square()
        squares["/".join(dict.fromkeys([role.tower, role.kind]))].append(square.sum())
        if role.kind == SHARED:
            squares[f"adapter/{SHARED}"].append(square.sum())
        elif role.kind != ROUTER and parameter in stacks:
            rows = square.unsqueeze(-1).flatten(1).sum(dim=1)  # a row may be one number
            own = rows.new_zeros(len(names)).index_add(0, stacks[parameter].to(rows.device), rows)
            for index in sorted(set(stacks[parameter].tolist())):
                squares[f"adapter/{names[index]}"].append(own[index])
    return dict(zip(squares, _roots(squares.values()), strict=True))


def _roots(squares: Iterable[list[Tensor]]) -> list[float]:
    """Return the root of each sum."""
    totals = [torch.stack(each).sum() for each in squares]
    return torch.stack(totals).sqrt().tolist() if totals else []


def _learned(module: MixtureModule) -> bool:
    return any(parameter.requires_grad for parameter in module.mixture.routers.parameters())
