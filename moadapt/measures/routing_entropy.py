"""Entropy of an input's weights: how many experts share it, in nats."""

from torchmetrics import MeanMetric

from moadapt.routed import Routed, entropy


class RoutingEntropy(MeanMetric):
    """The mean entropy of the weights that an input got, from 0, one expert alone, to ln E, all alike."""

    def update(self, routed: Routed) -> None:  # type: ignore[override]
        """Count inputs.

        Args:
            routed: The inputs that one place routed.
        """
        super().update(entropy(routed.shares), weight=routed.counted)
