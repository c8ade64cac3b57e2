"""Drift: how much of the weight moved to other experts between two evaluations of the same rows."""

from torch import Tensor
from torchmetrics import MeanMetric

from moadapt.routed import Routed


class Drift(MeanMetric):
    """The mean over rows of half the sum of absolute differences between two routings, from 0, the same, to 1."""

    def update(self, before: Tensor, after: Tensor) -> None:  # type: ignore[override]
        """Count rows.

        Args:
            before: Shares of the experts in each row, (B, E); see `row_shares`.
            after: Those of the same rows in the second evaluation, (B, E).
        """
        super().update((after - before).abs().sum(-1) / 2)


def row_shares(routed: Routed, rows: int) -> Tensor:
    """Return the mean over each row's inputs that count of what every expert got, (B, E).

    Args:
        routed: The inputs that one place routed.
        rows: B.
    """
    counted = routed.counted.reshape(rows, -1, 1).to(routed.shares.dtype)
    shares = routed.shares.reshape(rows, -1, routed.num_experts)
    return (shares * counted).sum(1) / counted.sum(1).clamp(min=1)
