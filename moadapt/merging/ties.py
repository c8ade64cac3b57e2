"""TIES: keep each expert's largest numbers, let them elect a sign for every weight, average those that agree.

Yadav et al., "TIES-Merging: Resolving Interference When Merging Models", section 4: trim, elect, disjoint mean.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from moadapt.merging.elementwise import added, check_density, elementwise, largest
from moadapt.merging.method import MergeMethod, Merging, SiteMerge
from moadapt.registry import MERGES

_ROUNDING = 1e-5
"""Sums that are smaller than this, relative to what was added, are rounding of products and elect no sign."""


@MERGES.register("ties")
@dataclass(frozen=True, kw_only=True)
class Ties(MergeMethod):
    """Trims each expert's change, elects a sign for every weight, and averages the experts that agree with it.

    Args:
        density: Share of each expert's numbers that is kept, above 0, up to 1.
        scale: Factor of the mean.

    Raises:
        ValueError: The density is no share.
    """

    density: float = 0.2
    scale: float = 1.0

    reads_rows: ClassVar[bool] = False

    def __post_init__(self) -> None:
        """Check the share."""
        check_density("ties", self.density)

    def prepare(self, merging: Merging) -> SiteMerge:
        """Return what trims, elects and averages."""
        chosen = merging.chosen
        return lambda at: elementwise(
            at, chosen, lambda change, _: largest(change, self.density), agreeing, scale=self.scale
        )


def agreeing(changes: Callable[[], Iterator[Tensor]]) -> Tensor:
    """Return for each number the mean of those changes that have the sign of the sum; 0 where the sum is, to rounding.

    Args:
        changes: At least one; a change of 0 has no sign and counts nothing.
    """
    elected, size = added(changes), added(lambda: (change.abs() for change in changes()))
    elected = torch.where(elected.abs() > _ROUNDING * size, elected, 0.0).sign_()
    total, count = torch.zeros_like(elected), torch.zeros_like(elected)
    for change in changes():
        agrees = (change * elected) > 0
        total += torch.where(agrees, change, 0.0)
        count += agrees
    return total.div_(count.clamp_(min=1))
