"""Mutual information of task and expert: how far experts belong to tasks, in nats.

`H(mean load) - mean H(load of a task)`, over tasks: 0 where all tasks are routed alike, the logarithm of their number
where no two share an expert. Each task counts alike, however many inputs it has.
"""

import torch
from torch import Tensor
from torchmetrics import Metric

from moadapt.routed import Routed, information


class TaskInformation(Metric):
    """What the task tells about the experts, from 0 to the smaller of ln E and the logarithm of the number of tasks.

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
        """Return the information; not a number where nothing was routed."""
        by_task = self.given[self.given.sum(-1) > 0]
        if not len(by_task):
            return self.given.new_tensor(float("nan"))
        return information(by_task / by_task.sum(-1, keepdim=True)).clamp(min=0)
