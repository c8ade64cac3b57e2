"""DARE: drop most numbers of every expert's change at random, rescale the others, and add up.

Yu et al., "Language Models are Super Mario: Absorbing Abilities from Homologous Models as a Free Lunch", section 3.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from moadapt.merging.elementwise import added, check_density, elementwise
from moadapt.merging.method import MergeMethod, Merging, SiteMerge
from moadapt.registry import MERGES


@MERGES.register("dare")
@dataclass(frozen=True, kw_only=True)
class Dare(MergeMethod):
    """Drops numbers of each expert's change at random, rescales the others so that the mean stays, and adds up.

    Args:
        density: Share of the numbers that is kept, above 0, up to 1.
        scale: Factor of the sum.
        seed: Of what is dropped, from 0.

    Raises:
        ValueError: The density is no share.
    """

    density: float = 0.5
    scale: float = 1.0
    seed: int = 0

    reads_rows: ClassVar[bool] = False

    def __post_init__(self) -> None:
        """Check the share."""
        check_density("dare", self.density)

    def prepare(self, merging: Merging) -> SiteMerge:
        """Return what drops and adds."""
        chosen = merging.chosen
        return lambda at: elementwise(at, chosen, self._dropped, added, scale=self.scale, seed=self.seed)

    def _dropped(self, change: Tensor, generator: torch.Generator) -> Tensor:
        kept = torch.rand(change.shape, generator=generator).to(change.device) < self.density
        return torch.where(kept, change / self.density, 0.0)
