"""Training-free routing by each adapter's strongest input direction: the score of expert e is `|x . v_e|`.

Ostapenko et al., "Towards Modular LLMs by Building and Reusing a Library of LoRAs", Arrow: `v_e` is the first right
singular vector of `DW_e`, the unit input that the adapter changes most. Here it is exact, not found by power iteration,
and `x` has unit size a feature, so that the temperature means the same at every site. Neither the size of an adapter
nor the basis that its factors are written in matters.
"""

from dataclasses import dataclass

from torch import Tensor

from moadapt.registry import ROUTERS
from moadapt_routers.direction_router import DirectionRouterSpec


@ROUTERS.register("arrow")
@dataclass(frozen=True, kw_only=True)
class Arrow(DirectionRouterSpec):
    """The k experts whose strongest input direction a token lies along most; fitted, not trained."""

    def directions(self, values: Tensor, vectors: Tensor) -> Tensor:
        """Return the first singular vector, (1, D); none of an adapter that changes nothing."""
        return vectors[:1]
