"""KnOTS: experts are first written in one common basis of outputs, and merged there number by number.

Stoica et al., "Model merging with SVD to tie the Knots", section 4: `[DW_1, ..., DW_E] = U S [V_1, ..., V_E]`, the V's
are merged by TIES, and `U S V` is the result. U and S come from the factors, by QR and products (R, R); what is merged
number by number has R rows, not F. Axes: D features in, F features out, R ranks of all experts.
"""

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from moadapt.adapters.delta import Delta
from moadapt.merging.deltas import scaled
from moadapt.merging.elementwise import check_density, elementwise, largest
from moadapt.merging.factored import Factored, factored
from moadapt.merging.method import MergeMethod, Merging, SiteMerge
from moadapt.merging.site_adapters import SiteAdapters
from moadapt.merging.ties import agreeing
from moadapt.registry import MERGES


@MERGES.register("knots")
@dataclass(frozen=True, kw_only=True)
class Knots(MergeMethod):
    """Writes the experts in one common basis of outputs and merges them there by TIES.

    Elsewhere than at linear layers it is TIES.

    Args:
        density: Share of each expert's numbers that is kept, above 0, up to 1.
        scale: Factor of the result.

    Raises:
        ValueError: The density is no share.
    """

    density: float = 0.5
    scale: float = 1.0

    reads_rows: ClassVar[bool] = False

    def __post_init__(self) -> None:
        """Check the share."""
        check_density("knots", self.density)

    def prepare(self, merging: Merging) -> SiteMerge:
        """Return what aligns and merges."""
        return partial(self._merged, merging.chosen)

    def _merged(self, chosen: tuple[int, ...], at: SiteAdapters) -> list[Delta]:
        terms = factored(at)
        if terms is None:
            return elementwise(at, chosen, lambda change, _: largest(change, self.density), agreeing, scale=self.scale)
        up, inner = aligned(terms, chosen)
        down = agreeing(lambda: (largest(each, self.density) for each in inner))
        biases = [at.own[e].bias for e in chosen]
        told = [bias for bias in biases if bias is not None]
        bias = agreeing(lambda: (largest(each, self.density) for each in told)) if told else None
        return [at.shared, scaled(Delta(down, up, bias=bias), self.scale)]


def aligned(terms: Factored, chosen: tuple[int, ...]) -> tuple[Tensor, list[Tensor]]:
    """Return the common outer side `U S`, as (R, F), and the inner side of each expert, (R, D).

    Args:
        terms: The experts of a site.
        chosen: Those that count.
    """
    own = [(terms.owner == expert) & ~terms.offset.bool() for expert in chosen]
    outer, inner = torch.linalg.qr(terms.up[torch.stack(own).any(dim=0)].double().mT)
    place = torch.stack(own).any(dim=0).cumsum(0) - 1
    coded = [inner[:, place[rows]] @ terms.down[rows].double() for rows in own]  # what each is in the basis `outer`
    values, left = torch.linalg.eigh(sum((each @ each.mT for each in coded), torch.zeros(len(inner)).double()))
    live = values > 1e-12 * values.sum()
    roots, left = values[live].sqrt(), left[:, live]
    up = (outer @ (left * roots)).mT
    return up.to(terms.up), [((left.mT @ each) / roots.unsqueeze(1)).to(terms.down) for each in coded]
