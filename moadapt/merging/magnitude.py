"""Magnitude pruning: keep the largest numbers of every expert's change, and add up."""

from dataclasses import dataclass
from typing import ClassVar

from moadapt.merging.elementwise import added, check_density, elementwise, largest
from moadapt.merging.method import MergeMethod, Merging, SiteMerge
from moadapt.registry import MERGES


@MERGES.register("magnitude")
@dataclass(frozen=True, kw_only=True)
class Magnitude(MergeMethod):
    """Keeps the largest numbers of each expert's change, and adds up.

    Args:
        density: Share of the numbers that is kept, above 0, up to 1.
        scale: Factor of the sum.

    Raises:
        ValueError: The density is no share.
    """

    density: float = 0.2
    scale: float = 1.0

    reads_rows: ClassVar[bool] = False

    def __post_init__(self) -> None:
        """Check the share."""
        check_density("magnitude", self.density)

    def prepare(self, merging: Merging) -> SiteMerge:
        """Return what prunes and adds."""
        chosen = merging.chosen
        return lambda at: elementwise(
            at, chosen, lambda change, _: largest(change, self.density), added, scale=self.scale
        )
