"""What routers by task share that learn how much of each expert a task takes.

Axes: B rows, H heads of the routing, E experts; tasks have an axis of their own.
"""

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from moadapt.router import Router, RouterSpec, RoutingContext, Scope


@dataclass(frozen=True, kw_only=True)
class TaskRouterSpec(RouterSpec):
    """What they have in common.

    Args:
        tasks: Names of the tasks; none is those of the experts, one task each.
        unknown: What a row of another task gets: an `error`, or the `average` of all experts.

    Raises:
        ValueError: `unknown` is none of these, or a task is named twice.
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
        """Return what weights are made of, (tasks, H, E)."""

    def rows_of(self, table: Tensor, context: RoutingContext) -> Tensor:
        """Return each row's weights, (B, 1, H, E), those of an unknown task being even.

        Args:
            table: Weights that sum to 1, (tasks, H, E).
            context: With the tasks of the rows.
        """
        assert context.task_ids is not None, "the mixture gives what a router needs"
        if context.available is not None:
            table = table * context.available
            table = table / table.sum(-1, keepdim=True).clamp(min=torch.finfo(table.dtype).tiny)
        even = torch.ones_like(table[:1]) if context.available is None else context.available.expand_as(table[:1])
        known = torch.cat([table, even / even.sum(-1, keepdim=True)])  # an unknown task's index, -1, is the last
        return known[context.task_ids].unsqueeze(1)


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
