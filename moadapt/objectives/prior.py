"""Prior: experts shall be used in given shares.

The Kullback-Leibler divergence `sum_e m_e log(m_e / q_e)` from the shares q that experts should have of all inputs to
the mean m of the inputs' probabilities. It is 0 where they agree; for even shares it is at most ln E.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from moadapt.objectives.objective import RoutingObjective
from moadapt.registry import OBJECTIVES
from moadapt.routed import Routed, entropy

if TYPE_CHECKING:
    from moadapt.mixture import Mixture


@OBJECTIVES.register("prior")
@dataclass(frozen=True, kw_only=True)
class Prior(RoutingObjective):
    """Experts used in given shares: how far their mean probabilities diverge from a prior, from 0.

    Args:
        weight: What the value is multiplied by before it joins the loss, 0 or more.
        shares: One an expert, above 0, of any sum; None is the same for all.

    Raises:
        ValueError: A share is not above 0, or there is not one for each expert.
    """

    shares: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        """Check the range."""
        super().__post_init__()
        if self.shares is not None and not all(share > 0 for share in self.shares):
            raise ValueError(f"Prior got shares={self.shares}; give numbers above 0, small ones for experts to avoid")

    def sums(self, routed: Routed) -> Tensor:
        """Return the probabilities of each expert, (E,)."""
        return routed.total(routed.probabilities)

    def value(self, sums: Tensor, routed: Routed) -> Tensor:
        """Return the divergence, in nats."""
        mean = sums / sums.sum().clamp(min=1e-12)
        wanted = mean.new_tensor(self.shares or (1.0,) * routed.num_experts)
        return -entropy(mean) - torch.dot(mean, (wanted / wanted.sum()).log())

    def check(self, mixture: "Mixture", tasks: Sequence[str]) -> None:
        """Refuse shares that are not one an expert."""
        super().check(mixture, tasks)
        if self.shares is not None and len(self.shares) != len(mixture.experts):
            raise ValueError(
                f"Prior got {len(self.shares)} shares for {len(mixture.experts)} experts; give one for each of "
                f"{', '.join(mixture.experts)}"
            )
