"""Drift: how much of the weight moved to other experts between two evaluations of the same rows."""

import torch
from torch import Tensor
from torchmetrics import Metric

from moadapt.routed import Routed


class Drift(Metric):
    """The mean over rows of half the sum of absolute differences between two routings, from 0, the same, to 1."""

    moved: Tensor
    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("moved", torch.tensor(0.0), dist_reduce_fx="sum")
        self.add_state("count", torch.tensor(0.0), dist_reduce_fx="sum")

    def update(self, before: Tensor, after: Tensor) -> None:
        """Count rows.

        Args:
            before: Shares of the experts in each row, (B, E); see `row_shares`.
            after: Those of the same rows in the second evaluation, (B, E).
        """
        self.moved += (after - before).abs().sum() / 2
        self.count += len(before)

    def compute(self) -> Tensor:
        """Return the mean; not a number where no row was evaluated twice."""
        return self.moved / self.count


def row_shares(routed: Routed, rows: int) -> Tensor:
    """Return the mean over each row's inputs that count of what every expert got, (B, E).

    Args:
        routed: The inputs that one place routed.
        rows: B.
    """
    counted = routed.counted.reshape(rows, -1, 1).to(routed.shares.dtype)
    shares = routed.shares.reshape(rows, -1, routed.num_experts)
    return (shares * counted).sum(1) / counted.sum(1).clamp(min=1)
