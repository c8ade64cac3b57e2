"""Merge for one task: exact where routing depends on the task only, else that task's mean routing."""

from collections.abc import Iterable

import torch
from torch import Tensor

from moadapt.context import routers_of
from moadapt.merging.calibration import Batch, as_batches, moments, rows_of_task
from moadapt.merging.mean_routing import split_rows
from moadapt.merging.plan import MergePlan
from moadapt.mixture import Mixture
from moadapt.registry import MERGES
from moadapt.router import RoutingContext
from moadapt.routing import Routing


@MERGES.register("task")
class TaskMerge:
    """Fold one task's adapters into the base."""

    def plan(
        self,
        mixture: Mixture,
        *,
        task: str | None = None,
        calibration: Batch | Iterable[Batch] | None = None,
        max_error: float | None = None,
    ) -> MergePlan:
        """Find the weights.

        Args:
            mixture: What to merge.
            task: Which task; needed where there are experts.
            calibration: Batches of what the mixture takes, with or without `task`; needed where routing depends on the
                input, and then only rows of this task count.
            max_error: Bound on the relative error of every site.

        Raises:
            ValueError: The task is missing or unknown, or calibration is needed and missing.
        """
        spec = mixture.spec.router
        if spec is None:
            return MergePlan(mixture, "task", {}, task=task, exact=True)
        if task is None:
            raise ValueError(f"merge 'task' needs task=, one of {', '.join(mixture.tasks)}")
        ids = mixture.task_ids(task)
        if spec.depends_on != "input":
            weights = {place.name: _fixed(mixture, i, ids) for i, place in enumerate(mixture.places)}
            return MergePlan(mixture, "task", weights, task=task, exact=True)
        if calibration is None:
            raise ValueError(
                f"{type(spec).__name__} routes by the input, so merge 'task' averages its routing: give "
                "calibration=, batches of this task's rows"
            )
        used, held_out, fresh = split_rows(rows_of_task(mixture, as_batches(calibration), task))
        found = moments(mixture, used)
        weights = {place: moment.mean.float() for place, moment in found.items()}
        return MergePlan(
            mixture, "task", weights, task=task, exact=False, found=found, held_out=held_out, fresh=fresh,
            max_error=max_error,
        )  # fmt: skip


def _fixed(mixture: Mixture, index: int, task_ids: Tensor | None) -> Tensor | Routing:
    """Evaluate a router that reads at most the task, or take what the caller has put in its place."""
    context = mixture.context
    routing = context.override
    if routing is None:
        with torch.no_grad():
            seen = RoutingContext(task_ids=task_ids, available=context.available)
            routing = routers_of(mixture.routers)[index](seen).detached()
    plain = routing.combines == "outputs" and routing.weights.shape[2] == 1
    return routing.dense().reshape(-1).cpu() if plain else routing
