"""Start at factors that are both random and orthogonal to each other, so that both have a gradient at once.

With `Q` a random orthogonal (r, r) matrix, `A` lies in the span of its even rows and `B` in that of its odd ones, so
`B A = 0` but for rounding. The frozen term of the interface takes the rounding off as well.
"""

import torch
from torch import Tensor

from moadapt.adapters.initial.interface import Initial, Layer
from moadapt.registry import INITIALS


@INITIALS.register("orthogonal")
class Orthogonal(Initial):
    """Both factors random, in complementary subspaces of the rank space; an even rank."""

    shifts = True

    def factors(self, layer: Layer) -> tuple[Tensor, Tensor]:
        """Return `down (r, D)` and `up (r, F)` with `up^T down = 0`, entries about 0.1 / sqrt(2)."""
        if layer.rank % 2:
            raise ValueError(f"init='orthogonal' splits the rank in two halves, but it is {layer.rank}; make it even")
        basis = torch.linalg.qr(torch.randn(layer.rank, layer.rank, device=layer.device)).Q
        half = layer.rank // 2
        down = basis[0::2].T @ torch.randn(half, layer.in_features, device=layer.device)
        up = basis[1::2].T @ torch.randn(half, layer.out_features, device=layer.device)
        return down / 10, up / 10
