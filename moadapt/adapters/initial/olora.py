"""Start at orthonormal factors of the frozen weight: `W0 = Q R`, `B0 = Q_r`, `A0 = R_r`.

Büyükakyüz, "OLoRA: Orthonormal Low-Rank Adaptation of Large Language Models", section 3.
"""

import torch
from torch import Tensor

from moadapt.adapters.initial.interface import Initial, Layer, check_rank
from moadapt.registry import INITIALS


@INITIALS.register("olora")
class OLoRA(Initial):
    """The first r columns and rows of the frozen weight's QR decomposition."""

    shifts = True

    def factors(self, layer: Layer) -> tuple[Tensor, Tensor]:
        """Return `down (r, D)`, rows of R, and `up (r, F)`, orthonormal columns of Q."""
        check_rank(layer, min(layer.in_features, layer.out_features))
        left, right = layer.once(self, lambda: tuple(torch.linalg.qr(layer.weight())))
        return right[: layer.rank], left.T[: layer.rank]
