"""What routers share that read the adapters' own weight changes: how far an input goes along directions of each expert.

Directions come from the singular value decomposition of `DW = up^T down`, taken from the factors by two QR
decompositions and one of an (R, R) matrix, so that nothing of DW's size is formed. Scores are two products,
`(x directions^T)^2 member`: no tensor has an expert axis beside a feature axis. Axes: B rows, T tokens, D features in,
F out, E experts, R ranks, N directions.
"""

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from moadapt.fitting import FittedRouter, Fitting
from moadapt.router import FitsFrom, Per, RoutingContext, Scope
from moadapt.routing import Routing
from moadapt_routers.retrieval import RetrievalSpec


def singular_directions(down: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """Return the singular values of `up^T down` above 0, largest first, and its right singular vectors.

    Args:
        down: (R, D).
        up: (R, F).

    Returns:
        (N,) and (N, D) in float64, N at most R.
    """
    inner, first = torch.linalg.qr(down.double().mT)
    _, last = torch.linalg.qr(up.double().mT)
    _, values, vectors = torch.linalg.svd(last @ first.mT, full_matrices=False)
    above = values > values.max().clamp(min=0) * 1e-10 if len(values) else values.bool()
    return values[above], (vectors @ inner.mT)[above]


@dataclass(frozen=True, kw_only=True)
class DirectionRouterSpec(RetrievalSpec):
    """What routers by the adapters' own directions have in common."""

    scope: Scope = "token"
    per: Per = "site"

    scopes: ClassVar[tuple[Scope, ...]] = ("token",)
    places: ClassVar[tuple[Per, ...]] = ("site",)

    @property
    def fits_from(self) -> frozenset[FitsFrom]:
        """It looks at the adapters alone."""
        return frozenset({"adapters"})

    @abstractmethod
    def directions(self, values: Tensor, vectors: Tensor) -> Tensor:
        """Return the directions of one expert, whose squared products with an input are summed, (N, D).

        Args:
            values: Singular values of its weight change, largest first, (R,).
            vectors: Right singular vectors, (R, D).
        """

    def router(self, dim: int, num_experts: int) -> "DirectionRouter":
        """Build the router of one site."""
        return DirectionRouter(self, dim, num_experts)


class DirectionRouter(FittedRouter):
    """Scores each expert by how far an input goes along its directions; one that is absent at the site is never chosen.

    Args:
        spec: Which directions, and how many experts a token gets.
        dim: D.
        num_experts: E.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"hidden"})
    state: ClassVar[tuple[str, ...]] = ("directions", "owners", "present")

    def __init__(self, spec: DirectionRouterSpec, dim: int, num_experts: int) -> None:
        super().__init__()
        self.spec, self.dim, self.num_experts = spec, dim, num_experts

    def shapes(self) -> dict[str, tuple[int | None, ...]]:
        """Return the shapes of the directions, of whose they are, and of whether an expert is present."""
        return {"directions": (None, self.dim), "owners": (None,), "present": (self.num_experts,)}

    def fit(self, fitting: Fitting) -> None:
        """Take the directions of the experts that sit at the site; one that changes nothing has none and scores 0."""
        found = []
        for name in fitting.experts:
            down, up = fitting.factors.of(name)
            found.append(self.spec.directions(*singular_directions(down, up)))
        counts = torch.tensor([len(each) for each in found])
        device = fitting.factors.down.device
        self.remember(
            directions=torch.cat(found).float(),
            owners=torch.arange(len(found)).repeat_interleave(counts).to(device),
            present=torch.tensor([name in fitting.factors.owners for name in fitting.experts], device=device),
        )

    def forward(self, context: RoutingContext) -> Routing:
        """Return sparse weights, (B, T, 1, K), with their indices and all scores as logits."""
        assert context.hidden is not None, "the mixture gives what a router needs"
        present = self.found("present")
        if context.available is not None:
            present = present & context.available
        return self.spec.choose(self.scores(context.hidden).unsqueeze(2), present)

    def scores(self, x: Tensor) -> Tensor:
        """Return how far inputs of unit size a feature go along each expert's directions, (B, T, E).

        Args:
            x: (B, T, D).
        """
        with torch.autocast(x.device.type, enabled=False):
            exact = torch.promote_types(x.dtype, torch.float32)
            x = functional.rms_norm(x.to(exact), (x.shape[-1],))
            along = x @ self.found("directions").to(exact).T
            member = functional.one_hot(self.found("owners"), self.num_experts).to(along)
            return (along.square() @ member).clamp(min=1e-24).sqrt()  # a root at 0 has no gradient

    def grow(self, count: int) -> None:
        """Know `count` more experts, of which nothing is known until it is fitted again."""
        super().grow(count)
        self.num_experts += count

    def trim(self, keep: Sequence[int]) -> None:
        """Keep the directions of these experts.

        Raises:
            ValueError: Fewer than k would be left.
        """
        self.spec.check_count(len(keep))
        self.num_experts = len(keep)
        if not self.fitted:
            return
        directions, owners, present = (self.found(name) for name in self.state)
        rows = [(owners == expert).nonzero().flatten() for expert in keep]
        counts = torch.tensor([len(each) for each in rows], device=owners.device)
        self.remember(
            directions=directions[torch.cat(rows)],
            owners=torch.arange(len(keep), device=owners.device).repeat_interleave(counts),
            present=present[list(keep)],
        )
