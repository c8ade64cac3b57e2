"""The experts of a site as one stack of rank-one terms, on which merges by least squares and by inputs work.

Axes: D features in, F features out, E experts, R ranks of all experts.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moadapt.adapters.delta import Delta
from moadapt.merging.site_adapters import SiteAdapters


@dataclass(frozen=True)
class Factored:
    """What experts add at a linear layer: `sum_r w_owner(r) up_r (down_r x + offset_r)`.

    Args:
        down: (R, D).
        up: (R, F).
        offset: 1 for a term that is a bias, else 0, (R,).
        owner: Index of the expert of each term, (R,).
    """

    down: Tensor
    up: Tensor
    offset: Tensor
    owner: Tensor

    def shrink(self, x: Tensor) -> Tensor:
        """Return `down x + offset`, (N, R), for inputs (N, D)."""
        return x @ self.down.T + self.offset

    def change(self, inner: Tensor, weights: Tensor) -> Delta:
        """Return the change with another map to the ranks, and biases by fixed weights.

        Args:
            inner: Takes the place of `down`, (R, D).
            weights: Of the experts, (E,), for biases.
        """
        told = self.offset.bool()
        bias = (weights.to(self.up)[self.owner] * self.offset) @ self.up if bool(told.any()) else None
        return Delta(inner[~told], self.up[~told], bias=bias)


def factored(at: SiteAdapters) -> Factored | None:
    """Return the experts of a site as one stack; None where they change something else than a linear layer.

    A change without low-rank form counts as one of full rank.

    Args:
        at: The site.
    """
    if at.site.form != "linear" or not at.has_experts or any(each.parameters for each in at.own):
        return None
    parts = [term for expert, each in enumerate(at.own) for term in _terms(expert, each, at)]
    if not parts:
        return None
    down, up, offset, owner = (torch.cat(sides) for sides in zip(*parts, strict=True))
    return Factored(down, up, offset, owner)


def _terms(expert: int, change: Delta, at: SiteAdapters) -> Sequence[tuple[Tensor, Tensor, Tensor, Tensor]]:
    exact = torch.promote_types(change.up.dtype, torch.float32)
    sides = [(change.down.to(exact), change.up.to(exact), 0.0)]
    if change.dense is not None:
        sides.append((change.dense.to(exact), torch.eye(len(change.dense)).to(sides[0][1]), 0.0))
    if change.bias is not None:
        sides.append((sides[0][0].new_zeros(1, at.site.in_features), change.bias.to(exact).unsqueeze(0), 1.0))
    return [(d, u, d.new_full((len(d),), flag), torch.full((len(d),), expert)) for d, u, flag in sides if len(d)]
