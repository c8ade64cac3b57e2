"""Training-free routing by how much each adapter would change a token: the score of expert e is `|S_e V_e^T x|`.

Fleshman and Van Durme, "SpectR: Dynamically Composing LM Experts with Spectral Routing": with `DW_e = U_e S_e V_e^T`
this is `|DW_e x|`, all directions counted by their singular values, where `arrow` looks at the first alone. A larger
adapter scores higher.
"""

from dataclasses import dataclass

from torch import Tensor

from moadapt.registry import ROUTERS
from moadapt_routers.direction_router import DirectionRouterSpec


@ROUTERS.register("spectral")
@dataclass(frozen=True, kw_only=True)
class Spectral(DirectionRouterSpec):
    """The k experts that would change a token most; fitted, not trained."""

    def directions(self, values: Tensor, vectors: Tensor) -> Tensor:
        """Return all singular vectors, each as long as its singular value, (R, D)."""
        return values.unsqueeze(1) * vectors
