"""What measures of load share: the sums of what every expert got, of all inputs or of those of each task."""

import torch
from torch import Tensor
from torchmetrics import Metric

from moadapt.routed import Routed


class ExpertTotals(Metric):
    """Sums shares over inputs, (E,).

    Args:
        num_experts: E.
    """

    given: Tensor

    def __init__(self, num_experts: int) -> None:
        super().__init__()
        self.add_state("given", torch.zeros(num_experts), dist_reduce_fx="sum")

    def update(self, routed: Routed) -> None:
        """Count inputs.

        Args:
            routed: The inputs that one place routed.
        """
        self.given += routed.total(routed.shares)


class TaskTotals(Metric):
    """Sums shares over the inputs of each task, (tasks, E).

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
