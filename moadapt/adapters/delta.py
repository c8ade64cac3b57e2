"""What the adapters of a site amount to: a change of weights to merge, or factors to compare."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor


class NotMergeable(ValueError):
    """The adapters of a bank are no affine map of the site's input, so no weight can hold them."""


@dataclass(frozen=True)
class Delta:
    """What a bank adds at a site under fixed weights, as a change of the module's own weight and bias.

    Args:
        down: (R, D).
        up: (R, F); the low-rank part is `up^T down`, (F, D).
        dense: A part without low-rank form, (F, D); of a norm's gain (F,).
        bias: (F,).
        parameters: Changes of parameters that are no `weight`, by name; of M stacked matrices, with a leading axis M.
    """

    down: Tensor
    up: Tensor
    dense: Tensor | None = None
    bias: Tensor | None = None
    parameters: "Mapping[str, Delta]" = field(default_factory=dict)

    @property
    def moves_weight(self) -> bool:
        """Whether there is a weight change at all, and not a bias alone."""
        return self.dense is not None or self.down.shape[-2] > 0

    def weight(self) -> Tensor:
        """Return the whole weight change, ([M,] F, D), of a norm (F,), in float32 or finer."""
        exact = torch.promote_types(self.down.dtype, torch.float32)
        if self.dense is not None and not self.down.numel():
            return self.dense.to(exact)
        product = self.up.to(exact).mT @ self.down.to(exact)
        return product if self.dense is None else product + self.dense.to(exact)


@dataclass(frozen=True)
class Factors:
    """The weight changes of a bank's adapters in low-rank form, for whatever compares adapters with each other.

    For each adapter, `up^T down` over its ranks is the whole change, (F, D), its scale included.

    Args:
        owners: Names of the adapters that the stacked ranks belong to, one a rank.
        down: (R, D).
        up: (R, F).
        frozen: Names of adapters that no optimiser reaches.
    """

    owners: tuple[str, ...]
    down: Tensor
    up: Tensor
    frozen: frozenset[str] = frozenset()

    @classmethod
    def join(cls, parts: "Sequence[Factors]") -> "Factors":
        """Put the factors of several banks of a site together.

        Args:
            parts: At least one.
        """
        owners = tuple(name for part in parts for name in part.owners)
        down, up = torch.cat([part.down for part in parts]), torch.cat([part.up for part in parts])
        return cls(owners, down, up, frozenset().union(*(part.frozen for part in parts)))

    def of(self, name: str) -> tuple[Tensor, Tensor]:
        """Return `down (r, D)` and `up (r, F)` of one adapter; r is 0 where it is absent."""
        rows = [index for index, owner in enumerate(self.owners) if owner == name]
        return self.down[rows], self.up[rows]
