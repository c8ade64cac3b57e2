"""Routing by task name: row of task t gets expert t and nothing else."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch

from moadapt.registry import ROUTERS
from moadapt.router import Router, RouterSpec, RoutingContext, Scope
from moadapt.routing import Routing

Unknown = Literal["error", "shared", "average"]


@ROUTERS.register("by_task")
@dataclass(frozen=True, kw_only=True)
class ByTask(RouterSpec):
    """Each row gets the expert that bears its task's name; the task must be given, also in deployment.

    Args:
        per: Kept for symmetry; all places route alike.
        unknown: What a row of another task gets: an `error`, no expert, so that the `shared` adapter acts alone, or
            the `average` of all experts.

    Raises:
        ValueError: `unknown` is none of these.
    """

    unknown: Unknown = "error"

    scopes: ClassVar[tuple[Scope, ...]] = ("sequence",)
    depends_on: ClassVar[Literal["nothing", "task", "input"]] = "task"
    alike: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Check the choice."""
        super().__post_init__()
        if self.unknown not in ("error", "shared", "average"):
            raise ValueError(f"ByTask got unknown={self.unknown!r}; choose error, shared or average")

    @property
    def takes_unknown_tasks(self) -> bool:
        """Whether rows may have a task without expert."""
        return self.unknown != "error"

    def build(self, dim: int, num_experts: int) -> "ByTaskRouter":
        """Build the router of one place; `dim` is not used."""
        return ByTaskRouter(num_experts, self.unknown)


class ByTaskRouter(Router):
    """Looks a row's expert up by its task.

    Args:
        num_experts: E.
        unknown: What rows of other tasks get.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"task_ids"})

    def __init__(self, num_experts: int, unknown: Unknown) -> None:
        super().__init__()
        self.num_experts, self.unknown = num_experts, unknown

    def forward(self, context: RoutingContext) -> Routing:
        """Return one index a row, (B, 1, 1, 1), of weight 1, or 0 where its expert is not available.

        Where rows of unknown tasks get an average, weights are dense, (B, 1, 1, E).
        """
        assert context.task_ids is not None, "the mixture gives what a router needs"
        known = (context.task_ids >= 0).view(-1, 1, 1, 1)
        routing = Routing.of_rows(context.task_ids.clamp(min=0), self.num_experts)
        every = torch.ones(self.num_experts, device=known.device)
        if context.available is not None:
            every = every * context.available
        if self.unknown == "average":
            return Routing(torch.where(known, routing.dense() * every, every / every.sum()), self.num_experts)
        return replace(routing, weights=routing.weights * known * every[routing.indices])

    def grow(self, count: int) -> None:
        """Know `count` more tasks."""
        self.num_experts += count

    def trim(self, keep: Sequence[int]) -> None:
        """Know only these tasks."""
        self.num_experts = len(keep)
