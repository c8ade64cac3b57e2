"""Start at a part of the frozen weight that is chosen by the layer's inputs.

With `C` the mean outer product of the inputs, `W0 C = U S V^T` and `W0 = U S (V^T C^-1)`. The adapter is the last r
terms, which matter least to what the base knows of such inputs, or the first r, which matter most to them: `s B0 A0 =
U_r S_r V_r^T C^-1`. Yang et al., "CorDA: Context-Oriented Decomposition Adaptation of Large Language Models", section
3. `C` is damped by 0.01 of its mean diagonal, doubled until its inverse is one. Scaling `C` shifts size from one factor
to the other and leaves their product, so it is brought to a mean diagonal of 1.
"""

import torch
from torch import Tensor

from moadapt.adapters.initial.interface import Initial, Layer, check_rank
from moadapt.registry import INITIALS

_CLOSE = 0.05
"""Largest Frobenius distance of `C C^-1` from the identity."""


class _CorDA(Initial):
    shifts = True
    reads_inputs = True

    def chosen(self, values: Tensor, rank: int) -> slice:
        """Return which of the singular values, greatest first, the adapter takes."""
        raise NotImplementedError

    def factors(self, layer: Layer) -> tuple[Tensor, Tensor]:
        """Return `down (r, D)` and `up (r, F)`, each with the square roots of the singular values over s."""
        check_rank(layer, min(layer.in_features, layer.out_features))
        left, values, right, inverse = layer.once(self, lambda: _decompose(layer))
        part = self.chosen(values, layer.rank)
        roots = (values[part] / layer.scale).sqrt().unsqueeze(1)
        return roots * (right @ inverse)[part], roots * left.T[part]


@INITIALS.register("corda_preserve")
class CorDAPreserve(_CorDA):
    """The r terms that matter least to calibration inputs, whose knowledge is kept: knowledge-preserved mode."""

    def chosen(self, values: Tensor, rank: int) -> slice:
        """Return the last ones."""
        return slice(len(values) - rank, len(values))


@INITIALS.register("corda_preview")
class CorDAPreview(_CorDA):
    """The r terms that matter most to calibration inputs, those of the task: instruction-previewed mode."""

    def chosen(self, values: Tensor, rank: int) -> slice:
        """Return the first ones."""
        return slice(0, rank)


def _decompose(layer: Layer) -> tuple[Tensor, ...]:
    """Return U (F, N), S (N,) and V^T (N, D) of `W0 C`, and the inverse of C."""
    assert layer.inputs is not None, "given where reads_inputs"
    matrix, inverse = damped(layer.inputs)
    return *torch.linalg.svd(layer.weight().to(matrix) @ matrix, full_matrices=False), inverse


def damped(inputs: Tensor) -> tuple[Tensor, Tensor]:
    """Return a damped matrix and its inverse, both (D, D).

    Args:
        inputs: Mean outer product of the inputs, (D, D).

    Raises:
        ValueError: It is zero or not finite.
    """
    size = float(inputs.diagonal().mean())
    if not 0 < size < float("inf"):
        raise ValueError(f"the inputs' mean square is {size}; calibrate with inputs that are finite and not all zero")
    one, damping = torch.eye(len(inputs), dtype=inputs.dtype, device=inputs.device), 0.01
    while True:
        matrix = inputs / size + damping * one
        inverse = torch.linalg.inv(matrix)
        if float(torch.dist(matrix @ inverse, one)) < _CLOSE:
            return matrix, inverse
        damping *= 2
