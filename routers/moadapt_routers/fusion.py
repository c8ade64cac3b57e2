"""Routing by attention over what the experts give: each token at each site asks, and each expert's output answers.

Pfeiffer et al., "AdapterFusion: Non-Destructive Task Composition for Transfer Learning", section 3.2:
`w_e = softmax_e(q^T K z_e / (s_e sqrt(m)))` with `q = Q norm(y)`, y what the frozen module gives and z_e what expert e
would add. Unlike the paper's, outputs count in relation to `s_e^2 = |y|^2 + |z_e|^2`, mean squares, as hidden states
differ in size from layer to layer. The paper's third matrix, over the outputs themselves, is left out: the router gives
weights and nothing else, so that any family goes with it and merges know what they leave out. Axes: B rows, T tokens,
E experts, F features out, m width.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from moadapt.registry import ROUTERS
from moadapt.router import Per, Reads, Router, RouterSpec, RoutingContext, Scope, mask_unavailable
from moadapt.routing import Routing


@ROUTERS.register("fusion")
@dataclass(frozen=True, kw_only=True)
class Fusion(RouterSpec):
    """All experts, blended for each token by attention over what each of them gives at the site (AdapterFusion).

    Args:
        width: Of queries and keys, m, 1 or more.

    Raises:
        ValueError: The width is below 1.
    """

    scope: Scope = "token"
    per: Per = "site"
    width: int = 64

    scopes: ClassVar[tuple[Scope, ...]] = ("token",)
    places: ClassVar[tuple[Per, ...]] = ("site",)
    reads: ClassVar[Reads] = "outputs"

    def __post_init__(self) -> None:
        """Check the range."""
        super().__post_init__()
        if self.width < 1:
            raise ValueError(f"Fusion got width={self.width}; it must be at least 1")

    def build(self, dim: int, num_experts: int) -> "FusionRouter":
        """Build the router of one site."""
        return FusionRouter(dim, num_experts, self.width)


class FusionRouter(Router):
    """Queries from the output of a site, keys from those of its experts.

    Args:
        dim: F.
        num_experts: E.
        width: m.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"output", "outputs"})

    def __init__(self, dim: int, num_experts: int, width: int) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.query = nn.Parameter(torch.randn(width, dim) * dim**-0.5)
        self.key = nn.Parameter(torch.randn(width, dim) * dim**-0.5)

    def forward(self, context: RoutingContext) -> Routing:
        """Return dense weights, (B, T, 1, E)."""
        assert context.output is not None, "the place gives its routers what they need"
        assert context.outputs is not None, "the place gives its routers what they need"
        logits = self._logits(context.output, context.outputs).unsqueeze(2)
        return Routing(mask_unavailable(logits, context.available).softmax(-1), self.num_experts, logits=logits)

    def grow(self, count: int) -> None:
        """Listen to `count` more experts, by the same keys."""
        self.num_experts += count

    def trim(self, keep: Sequence[int]) -> None:
        """Listen to these experts only."""
        self.num_experts = len(keep)

    def _logits(self, output: Tensor, outputs: Tensor) -> Tensor:
        """Return (B, T, E); the keys' matrix is applied to the one query, not to E outputs."""
        with torch.autocast(output.device.type, enabled=False):
            exact = torch.promote_types(output.dtype, torch.float32)
            y, z = output.to(exact), outputs.to(exact)
            query = functional.layer_norm(y, y.shape[-1:]) @ self.query.to(exact).T
            asked = query @ self.key.to(exact) * len(self.key) ** -0.5
            squares: Tensor = torch.linalg.vector_norm(z, dim=-1).square() / z.shape[-1]
            sizes = (y.square().mean(-1, keepdim=True) + squares + 1e-5).sqrt()
            products: Tensor = (z @ asked.unsqueeze(-1)).squeeze(-1)
            return products / sizes
