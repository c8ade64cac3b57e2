"""Routing by task name: row of task t gets expert t and nothing else."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from moadapt.registry import ROUTERS
from moadapt.router import Router, RouterSpec, RoutingContext, Scope
from moadapt.routing import Routing


@ROUTERS.register("by_task")
@dataclass(frozen=True, kw_only=True)
class ByTask(RouterSpec):
    """Each row gets the expert that bears its task's name; the task must be given, also in deployment.

    Args:
        per: Kept for symmetry; all places route alike.
    """

    scopes: ClassVar[tuple[Scope, ...]] = ("sequence",)
    depends_on: ClassVar[Literal["nothing", "task", "input"]] = "task"
    alike: ClassVar[bool] = True

    def build(self, dim: int, num_experts: int) -> "ByTaskRouter":
        """Build the router of one place; `dim` is not used."""
        return ByTaskRouter(num_experts)


class ByTaskRouter(Router):
    """Looks a row's expert up by its task.

    Args:
        num_experts: E.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"task_ids"})

    def __init__(self, num_experts: int) -> None:
        super().__init__()
        self.num_experts = num_experts

    def forward(self, context: RoutingContext) -> Routing:
        """Return one index a row, (B, 1, 1, 1), of weight 1, or 0 where its expert is not available."""
        assert context.task_ids is not None, "the mixture gives what a router needs"
        routing = Routing.of_rows(context.task_ids, self.num_experts)
        if context.available is None:
            return routing
        return replace(routing, weights=routing.weights * context.available[routing.indices])

    def grow(self, count: int) -> None:
        """Know `count` more tasks."""
        self.num_experts += count

    def trim(self, keep: Sequence[int]) -> None:
        """Know only these tasks."""
        self.num_experts = len(keep)
