"""Algebra of changes of weights: sums, differences, factors and the nearest change of lower rank.

Axes: D features in, F features out, R ranks, M stacked matrices.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from moadapt.adapters.delta import Delta


def total(deltas: Sequence[Delta]) -> Delta:
    """Add changes up, low-rank parts side by side.

    Args:
        deltas: At least one.
    """
    dense = [delta.dense for delta in deltas if delta.dense is not None]
    bias = [delta.bias for delta in deltas if delta.bias is not None]
    names = dict.fromkeys(name for delta in deltas for name in delta.parameters)
    return Delta(
        torch.cat([delta.down for delta in deltas], dim=-2),
        torch.cat([delta.up for delta in deltas], dim=-2),
        torch.stack(dense).sum(0) if dense else None,
        torch.stack(bias).sum(0) if bias else None,
        {name: total([delta.parameters[name] for delta in deltas if name in delta.parameters]) for name in names},
    )


def scaled(delta: Delta, factor: float) -> Delta:
    """Return a change times a number.

    Args:
        delta: The change.
        factor: The number.
    """
    dense, bias = (None if part is None else part * factor for part in (delta.dense, delta.bias))
    parameters = {name: scaled(part, factor) for name, part in delta.parameters.items()}
    return Delta(delta.down, delta.up * factor, dense, bias, parameters)


def without(whole: Delta, part: Delta) -> Delta:
    """Take one change out of another; rank-one terms that both have cancel exactly.

    Args:
        whole: Of some banks.
        part: Of the same banks.
    """
    assert whole.parameters.keys() == part.parameters.keys(), "of the same banks"
    parameters = {name: without(whole.parameters[name], part.parameters[name]) for name in whole.parameters}
    if whole.down.shape != part.down.shape or not torch.equal(whole.down, part.down):
        rest = total([whole, scaled(part, -1.0)])
        return Delta(rest.down, rest.up, rest.dense, rest.bias, parameters)
    dense, bias = _minus(whole.dense, part.dense), _minus(whole.bias, part.bias)
    return Delta(whole.down, whole.up - part.up, dense, bias, parameters)


def compact(delta: Delta) -> Delta:
    """Leave out rank-one terms that add nothing, such as those of other experts.

    Args:
        delta: The change.
    """
    kept = (delta.up != 0).any(-1)
    kept = kept.any(0) if kept.ndim == 2 else kept
    parameters = {name: compact(part) for name, part in delta.parameters.items()}
    return replace(delta, down=delta.down[..., kept, :], up=delta.up[..., kept, :], parameters=parameters)


@dataclass(frozen=True)
class Spectrum:
    """Singular values of a change, each of its matrices on its own.

    Args:
        values: ([M,] R), falling.
    """

    values: Tensor

    def dropped(self, rank: int) -> float:
        """Return the sum of the squares of what a change of this rank leaves out."""
        return float(self.values[..., rank:].double().square().sum())


def truncated(delta: Delta, rank: int) -> tuple[Delta, list[Spectrum]]:
    """Return the nearest change of lower rank in Frobenius norm, biases and gains kept, and what it was cut from.

    Low-rank factors go through QR, so that no (F, D) is formed for them.

    Args:
        delta: The change.
        rank: Of each of its matrices at most, from 1.
    """
    parts = {name: truncated(part, rank) for name, part in delta.parameters.items()}
    spectra = [spectrum for _, own in parts.values() for spectrum in own]
    parameters = {name: part for name, (part, _) in parts.items()}
    if (delta.dense is not None and delta.dense.ndim < 2) or not delta.moves_weight:
        return replace(delta, parameters=parameters), spectra
    left, values, right = _decomposed(delta)
    down, up = right[..., :rank, :], (left * values.unsqueeze(-2))[..., :rank].mT
    kept = Delta(down.to(delta.down).contiguous(), up.to(delta.up).contiguous(), None, delta.bias, parameters)
    return kept, [Spectrum(values), *spectra]


def apply(delta: Delta, x: Tensor) -> Tensor:
    """Return what a change of a linear layer's weight and bias adds to its output, (N, F).

    Args:
        delta: Of one matrix.
        x: (N, D).
    """
    y = (x @ delta.down.to(x).T) @ delta.up.to(x)
    y = y if delta.dense is None else y + x @ delta.dense.to(x).T
    return y if delta.bias is None else y + delta.bias.to(x)


def _decomposed(delta: Delta) -> tuple[Tensor, Tensor, Tensor]:
    """Return the singular value decomposition, ([M,] F, R), ([M,] R) and ([M,] R, D)."""
    if delta.dense is not None:
        return torch.linalg.svd(delta.weight(), full_matrices=False)  # type: ignore[no-any-return]
    exact = torch.promote_types(delta.down.dtype, torch.float32)
    (outer, up), (inner, down) = (torch.linalg.qr(side.to(exact).mT) for side in (delta.up, delta.down))
    left, values, right = torch.linalg.svd(up @ down.mT, full_matrices=False)
    return outer @ left, values, right @ inner.mT


def _minus(whole: Tensor | None, part: Tensor | None) -> Tensor | None:
    if whole is None or part is None:
        return whole if part is None else -part
    return whole - part
