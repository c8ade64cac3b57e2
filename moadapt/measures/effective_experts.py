"""Effective number of experts: how many an input uses, those of small weight counting little.

`(sum_e w_e)^2 / sum_e w_e^2` of an input's weights w: the effective sample size of importance sampling.
"""

from torchmetrics import MeanMetric

from moadapt.routed import Routed


class EffectiveExperts(MeanMetric):
    """The mean effective number of experts of an input, from 1 to E; inputs that got nothing have none."""

    def update(self, routed: Routed) -> None:  # type: ignore[override]
        """Count inputs.

        Args:
            routed: The inputs that one place routed.
        """
        squares = routed.shares.square().sum(-1)
        super().update(routed.shares.sum(-1).square() / squares.clamp(min=1e-12), weight=routed.counted)
