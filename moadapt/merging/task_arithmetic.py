"""Task arithmetic: the changes of all experts, added up.

Ilharco et al., "Editing Models with Task Arithmetic", section 4: `W + s sum_e DW_e`. Here on the products `B A`.
"""

from dataclasses import dataclass
from typing import ClassVar

from moadapt.merging.method import Blend, MergeMethod, Merging
from moadapt.registry import MERGES


@MERGES.register("task_arithmetic")
@dataclass(frozen=True, kw_only=True)
class TaskArithmetic(MergeMethod):
    """Adds the changes of all experts, times one factor.

    Args:
        scale: The factor.
    """

    scale: float = 1.0

    reads_rows: ClassVar[bool] = False

    def prepare(self, merging: Merging) -> Blend:
        """Give every expert the factor as its weight."""
        even = merging.even(self.scale)
        return Blend(merging.by_site({place.name: even for place in merging.mixture.places}))
