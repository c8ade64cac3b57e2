"""Orthogonality: adapters that sit at the same sites shall not do the same thing, see `moadapt.objectives.overlap`."""

from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from moadapt.names import SHARED
from moadapt.objectives.objective import ParameterObjective
from moadapt.objectives.overlap import Measure, Overlap, Side, grouped_overlaps
from moadapt.registry import OBJECTIVES

if TYPE_CHECKING:
    from moadapt.mixture import Mixture


@OBJECTIVES.register("orthogonality")
@dataclass(frozen=True, kw_only=True)
class Orthogonality(ParameterObjective):
    """Mean overlap of the adapters of a site, over pairs of which at least one is trained.

    Frozen adapters count and get no gradient, so that new adapters keep clear of old ones. Families without low-rank
    form are left out.

    Args:
        weight: What the mean is multiplied by before it joins the loss, 0 or more.
        measure: What is compared: whole weight changes (`deltas`, 0 to 1), the subspaces they read or write
            (`subspaces`, 0 to 1), or `raw` products of the factors, which depend on the basis that an adapter happens
            to be written in.
        side: Whether `subspaces` and `raw` compare what adapters read (`input`) or write (`output`).
        experts: Whether experts are compared with each other.
        shared: Whether the shared adapter is compared with the experts.

    Raises:
        ValueError: A choice is unknown, or there is nothing to compare.
    """

    measure: Measure = "deltas"
    side: Side = "input"
    experts: bool = True
    shared: bool = True

    def __post_init__(self) -> None:
        """Check the choices."""
        super().__post_init__()
        if self.measure not in ("deltas", "subspaces", "raw") or self.side not in ("input", "output"):
            raise ValueError(
                f"Orthogonality got measure={self.measure!r}, side={self.side!r}; measure is deltas, "
                "subspaces or raw, side is input or output"
            )
        if self.measure == "deltas" and self.side == "output":
            raise ValueError("Orthogonality of deltas has no side; leave side out, or give measure: subspaces")
        if not (self.experts or self.shared):
            raise ValueError("Orthogonality got experts=False and shared=False; let it compare at least one of them")

    def value(self, mixture: "Mixture") -> Tensor:
        """Return the mean overlap, over all sites and pairs.

        Raises:
            ValueError: No two adapters that it compares share a site and can be trained.
        """
        found = [self._pairs(group) for group in grouped_overlaps(mixture, self.measure, self.side)]
        terms = torch.cat([pairs.flatten() for pairs in found]) if found else torch.empty(0)
        if not len(terms):
            raise ValueError(
                "Orthogonality finds no two adapters to keep apart: at no site do two of low-rank form sit together, "
                "one of them trained, that experts and shared let it compare; give more adapters, or leave it out"
            )
        return terms.mean()

    def _pairs(self, group: Overlap) -> Tensor:
        """Return the terms of some sites, (S, pairs)."""
        chosen = [
            (i, j)
            for (i, first), (j, second) in combinations(enumerate(group.names), 2)
            if (self.shared if SHARED in (first, second) else self.experts) and not {first, second} <= group.frozen
        ]
        rows, columns = [i for i, _ in chosen], [j for _, j in chosen]
        return group.matrices[:, rows, columns]
