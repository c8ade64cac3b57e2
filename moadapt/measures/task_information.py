"""Mutual information of task and expert: how far experts belong to tasks, in nats.

`H(mean load) - mean H(load of a task)`, over tasks: 0 where all tasks are routed alike, the logarithm of their number
where no two share an expert. Each task counts alike, however many inputs it has.
"""

from torch import Tensor

from moadapt.measures.totals import TaskTotals
from moadapt.routed import information


class TaskInformation(TaskTotals):
    """What the task tells about the experts, from 0 to the smaller of ln E and the logarithm of the number of tasks."""

    def compute(self) -> Tensor:
        """Return the information; not a number where nothing was routed."""
        by_task = self.given[self.given.sum(-1) > 0]
        if not len(by_task):
            return self.given.new_tensor(float("nan"))
        return information(by_task / by_task.sum(-1, keepdim=True)).clamp(min=0)
