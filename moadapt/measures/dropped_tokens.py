"""Dropped tokens: choices that were worth nothing, as where an expert has no room left."""

from torchmetrics import MeanMetric

from moadapt.routed import Routed


class DroppedTokens(MeanMetric):
    """The share of an input's chosen experts that got weight 0, from 0 to 1; a dense routing chooses none in vain."""

    def update(self, routed: Routed) -> None:  # type: ignore[override]
        """Count choices.

        Args:
            routed: The inputs that one place routed.
        """
        dropped = (routed.chosen & (routed.weights == 0)).to(routed.weights)
        super().update(dropped, weight=routed.chosen * routed.counted.unsqueeze(-1))
