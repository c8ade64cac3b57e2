"""Start in the directions that explain most of the layer's inputs: rows of `A` are their top right singular vectors.

Paischer et al., "One Initialization to Rule them All: Fine-tuning via Explained Variance Adaptation", section 3. The
vectors are those of the inputs themselves, as `A` multiplies inputs whose mean was not taken off.
"""

import torch
from torch import Tensor

from moadapt.adapters.initial.interface import Initial, Layer, check_rank
from moadapt.registry import INITIALS


@INITIALS.register("eva")
class EVA(Initial):
    """The r directions of the inputs' greatest second moment, `up` zero; reads calibration inputs."""

    reads_inputs = True

    def factors(self, layer: Layer) -> tuple[Tensor, Tensor]:
        """Return `down (r, D)`, orthonormal, and `up (r, F)`, zero."""
        assert layer.inputs is not None, "given where reads_inputs"
        check_rank(layer, layer.in_features)
        down = torch.linalg.eigh(layer.inputs).eigenvectors.T.flip(0)[: layer.rank]
        largest = down.gather(1, down.abs().argmax(dim=1, keepdim=True))
        down = down * largest.sign()  # a decomposition leaves the sign to rounding
        return down, down.new_zeros(layer.rank, layer.out_features)
