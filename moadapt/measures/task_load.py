"""Load by task: which experts the inputs of each task get; the confusion matrix of tasks and experts."""

from torch import Tensor

from moadapt.measures.totals import TaskTotals


class TaskLoad(TaskTotals):
    """The share of each expert in what was routed of each task, (tasks, E), rows summing to 1."""

    def compute(self) -> Tensor:
        """Return the shares; not a number in the row of a task of which nothing was routed."""
        return self.given / self.given.sum(-1, keepdim=True)
