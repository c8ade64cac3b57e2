"""Start at the principal part of the frozen weight: `W0 = U S V^T`, `s B0 A0 = U_r S_r V_r^T`.

Meng et al., "PiSSA: Principal Singular Values and Singular Vectors Adaptation", section 3.
"""

import torch
from torch import Tensor

from moadapt.adapters.initial.interface import Initial, Layer, check_rank
from moadapt.registry import INITIALS


@INITIALS.register("pissa")
class PiSSA(Initial):
    """The r greatest singular values of the frozen weight, with their vectors."""

    shifts = True

    def factors(self, layer: Layer) -> tuple[Tensor, Tensor]:
        """Return `down (r, D)` and `up (r, F)`, each with the square roots of the singular values over s."""
        check_rank(layer, min(layer.in_features, layer.out_features))
        left, values, right = layer.once(self, lambda: tuple(torch.linalg.svd(layer.weight(), full_matrices=False)))
        roots = (values[: layer.rank] / layer.scale).sqrt().unsqueeze(1)
        return roots * right[: layer.rank], roots * left.T[: layer.rank]
