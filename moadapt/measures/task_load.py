"""Load by task: which experts the inputs of each task get; the confusion matrix of tasks and experts."""

import torch
from torch import Tensor
from torchmetrics import Metric

from moadapt.routed import Routed


class TaskLoad(Metric):
    """The share of each expert in what was routed of each task, (tasks, E), rows summing to 1.

    Args:
        num_tasks: How many tasks.
        num_experts: E.
    """

    given: Tensor

    def __init__(self, num_tasks: int, num_experts: int) -> None:
        super().__init__()
        self.add_state("given", torch.zeros(num_tasks, num_experts), dist_reduce_fx="sum")

    def update(self, routed: Routed) -> None:
        """Count inputs whose task is known.

        Args:
            routed: The inputs that one place routed.
        """
        if routed.tasks is not None:
            self.given += routed.total_by_task(routed.shares)

    def compute(self) -> Tensor:
        """Return the shares; not a number in the row of a task of which nothing was routed."""
        return self.given / self.given.sum(-1, keepdim=True)
