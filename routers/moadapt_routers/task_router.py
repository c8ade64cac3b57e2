"""What routers by task share that learn how much of each expert a task takes.

Axes: B rows, H heads of the routing, E experts; tasks have an axis of their own.
"""

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from moadapt.router import Router, RouterSpec, RoutingContext, Scope, mask_unavailable
from moadapt.routing import Routing


@dataclass(frozen=True, kw_only=True)
class TaskRouterSpec(RouterSpec):
    """What they have in common.

    Args:
        tasks: Names of the tasks; none is those of the experts, one task each.
        unknown: What a row of another task gets: an `error`, or the `average` of all experts.

    Raises:
        ValueError: `unknown` is none of these, a task is named twice, or `tasks` is text in the place of a list.
    """

    tasks: tuple[str, ...] = ()
    unknown: Literal["error", "average"] = "error"

    scopes: ClassVar[tuple[Scope, ...]] = ("sequence",)
    depends_on: ClassVar[Literal["nothing", "task", "input"]] = "task"

    def __post_init__(self) -> None:
        """Check the choice and the names."""
        super().__post_init__()
        name = type(self).__name__
        if self.unknown not in ("error", "average"):
            raise ValueError(f"{name} got unknown={self.unknown!r}; choose error or average")
        if isinstance(self.tasks, str):
            raise ValueError(f"{name} got tasks={self.tasks!r}; give a list, such as [{self.tasks}]")
        if len(set(self.tasks)) < len(self.tasks):
            raise ValueError(f"{name} got tasks={self.tasks}; name each once")

    @property
    def takes_unknown_tasks(self) -> bool:
        """Whether rows may have a task that is none of these."""
        return self.unknown != "error"

    def task_names(self, experts: Sequence[str]) -> tuple[str, ...]:
        """Return the given names, or the experts'."""
        return self.tasks or tuple(experts)


class TaskRouter(Router):
    """Gives each row the weights of its task.

    Args:
        num_experts: E.
        owned: Whether each expert is a task's own, so that tasks come and go with experts.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"task_ids"})

    def __init__(self, num_experts: int, *, owned: bool) -> None:
        super().__init__()
        self.num_experts, self.owned = num_experts, owned

    @abstractmethod
    def logits(self) -> Tensor:
        """Return what weights are the softmax of, (tasks, H, E)."""

    def of_tasks(self, logits: Tensor, context: RoutingContext) -> Routing:
        """Return the weights of each row's task, (B, 1, H, E), even ones where the task is unknown.

        Args:
            logits: What to take the softmax of, (tasks, H, E); objectives judge the routing by `self.logits()`.
            context: With the tasks of the rows.
        """
        chosen, judged = (_rows(each, context.task_ids) for each in (logits, self.logits()))
        return Routing(mask_unavailable(chosen, context.available).softmax(-1), self.num_experts, logits=judged)


def _rows(table: Tensor, task_ids: Tensor | None) -> Tensor:
    """Return each row's logits, (B, 1, H, E); the index of an unknown task, -1, takes zeros behind the last one."""
    assert task_ids is not None, "the mixture gives what a router needs"
    return torch.cat([table, torch.zeros_like(table[:1])])[task_ids].unsqueeze(1)


def grown(parameter: Tensor, rows: int, columns: int, spread: float) -> torch.nn.Parameter:
    """Return a parameter with fresh entries behind the old ones of its first and last axis.

    Args:
        parameter: (rows, ..., columns).
        rows: How many more.
        columns: How many more.
        spread: Fresh entries are uniform from -spread to spread.
    """
    old = parameter.detach()
    wider = old.new_empty(*old.shape[:-1], columns).uniform_(-spread, spread)
    wide = torch.cat([old, wider], dim=-1)
    return torch.nn.Parameter(torch.cat([wide, wide.new_empty(rows, *wide.shape[1:]).uniform_(-spread, spread)]))
