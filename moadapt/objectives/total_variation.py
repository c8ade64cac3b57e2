"""Total variation of routing over images: patches that lie side by side shall be routed alike.

After the smoothness penalty of CARE-Edit (2025). The value is the mean, over all pairs of image tokens that are
neighbours in a row or a column of their image, of the total variation distance of their probabilities,
`1/2 sum_e |p_e - q_e|`: 0 for a constant map, 1 where no neighbours share an expert. Axes: S side of an image, H
heads, E experts.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from moadapt.objectives.objective import RoutingObjective
from moadapt.registry import OBJECTIVES
from moadapt.routed import Routed
from moadapt.router import Scope

if TYPE_CHECKING:
    from moadapt.mixture import Mixture


@OBJECTIVES.register("total_variation")
@dataclass(frozen=True, kw_only=True)
class TotalVariation(RoutingObjective):
    """Mean distance of the routings of neighbouring image tokens, from 0 to 1; images are squares of tokens."""

    scopes: ClassVar[tuple[Scope, ...]] = ("token",)

    def check(self, mixture: "Mixture", tasks: Sequence[str]) -> None:
        """Refuse routers by sequence, and such as serve other places than the language tower.

        Raises:
            ValueError: There are some, or no router that learns.
        """
        super().check(mixture, tasks)
        router = mixture.spec.router
        if router is not None and router.scope not in self.scopes:
            raise ValueError(
                f'TotalVariation compares tokens, but {router} routes by {router.scope}; use scope="token"'
            )
        elsewhere = [place.name for place in mixture.places if place.tower != "language"]
        if elsewhere:
            raise ValueError(
                f"TotalVariation finds images among a text's tokens, but the router at {elsewhere[0]} reads none; "
                "leave experts out there, or leave the objective out"
            )

    def sums(self, routed: Routed) -> Tensor:
        """Return the distances of neighbours and the number of pairs, (2,).

        Raises:
            ValueError: Image tokens that follow each other are no square.
        """
        nothing = routed.weights.new_zeros(2)
        if routed.images is None:
            return nothing
        probabilities = routed.probabilities.unflatten(0, routed.shape)  # type: ignore[no-untyped-call]
        image = (routed.images & (routed.counted > 0)).view(routed.shape)[:, :, 0]
        found = [_variation(_square(part)) for part in _images(probabilities, image)]
        return torch.stack([nothing, *found]).sum(dim=0)

    def value(self, sums: Tensor, routed: Routed) -> Tensor:
        """Return the mean."""
        return sums[0] / sums[1].clamp(min=1)


def _images(probabilities: Tensor, image: Tensor) -> tuple[Tensor, ...]:
    """Part the image tokens of all rows where one does not follow the other, (tokens, H, E) each.

    Args:
        probabilities: (B, T, H, E).
        image: Which tokens are of images, (B, T).
    """
    first = image & ~functional.pad(image[:, :-1], (1, 0), value=False)
    which = first.flatten().cumsum(0)[image.flatten()]
    lengths = torch.unique_consecutive(which, return_counts=True)[1].tolist()
    return torch.split(probabilities[image], lengths) if lengths else ()


def _square(tokens: Tensor) -> Tensor:
    """Lay out an image's tokens, (S, S, H, E)."""
    side = math.isqrt(len(tokens))
    if side * side != len(tokens):
        raise ValueError(
            f"TotalVariation takes images for squares of tokens, but {len(tokens)} image tokens follow each other; "
            "leave it out for this base, or give one image at a time, of a square number of tokens"
        )
    return tokens.view(side, side, *tokens.shape[1:])


def _variation(grid: Tensor) -> Tensor:
    """Return the summed distances of neighbours in a grid (S, S, H, E), and how many pairs there are, (2,)."""
    steps = (grid.diff(dim=0), grid.diff(dim=1))
    distances = [step.abs().sum(-1) / 2 for step in steps]
    pairs = grid.new_tensor(float(sum(distance.numel() for distance in distances)))
    return torch.stack([torch.stack([distance.sum() for distance in distances]).sum(), pairs])
