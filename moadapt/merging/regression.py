"""Merge by the one linear map a site that comes nearest to the routed outputs on calibration rows.

Ridge regression toward the least-squares weights `a`: with inputs `x` and the routed change `B^T u(x)`, the map is
`B^T N`, `N = a A + E[(u - a A x) x^T] (E[x x^T] + ridge I)^-1`, so that it lies in the span of the stacked B's. On its
own rows no map of that site does better as the ridge goes to 0. Axes: D features, E experts, R ranks of all experts.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from moadapt.adapters.delta import Delta
from moadapt.merging.least_squares import nearest_weights
from moadapt.merging.method import Blend, MergeMethod, Merging, SiteMerge
from moadapt.merging.site_adapters import SiteAdapters
from moadapt.merging.statistics import SiteStatistics, site_statistics
from moadapt.registry import MERGES


@MERGES.register("regression")
@dataclass(frozen=True, kw_only=True)
class Regression(MergeMethod):
    """Finds the linear map of each site whose outputs come nearest to the routed ones.

    Elsewhere than at linear layers it is the mean routing.

    Args:
        ridge: How strongly the map is held to the least-squares weights, relative to the inputs' mean square, from 0;
            few rows need more.

    Raises:
        ValueError: The ridge is negative.
    """

    ridge: float = 0.01

    def __post_init__(self) -> None:
        """Check the range."""
        if not self.ridge >= 0:
            raise ValueError(f"merge 'regression' got ridge={self.ridge}; give 0 or more")

    def prepare(self, merging: Merging) -> SiteMerge:
        """Gather statistics, unless the routing is fixed and so exact."""
        blend = Blend(merging.by_site(merging.weights()))
        if merging.fixed is not None:
            return blend
        found: Any = site_statistics(merging.mixture, merging.rows, with_inputs=True)
        return partial(self._merged, found, blend)

    def _merged(self, found: dict[str, SiteStatistics], blend: Blend, at: SiteAdapters) -> list[Delta]:
        here, start = found.get(at.site.path), blend.weights.get(at.site.path)
        if here is None or not isinstance(start, Tensor):
            return blend(at)
        weights = nearest_weights(here, start)
        return [at.shared, here.terms.change(nearest_map(here, weights, self.ridge).to(here.terms.down), weights)]


def nearest_map(found: SiteStatistics, weights: Tensor, ridge: float) -> Tensor:
    """Return the map to the ranks, (R, D), whose outputs come nearest.

    Args:
        found: At one site, with products of inputs.
        weights: To which it is held, (E,).
        ridge: How strongly, relative to the inputs' mean square.
    """
    assert found.apart is not None, "inputs were asked for"
    assert found.inputs is not None, "inputs were asked for"
    each = weights[found.terms.owner].unsqueeze(1)
    routed, shrunk = found.apart
    correction = solved(found.inputs, routed - each * shrunk, ridge)
    return each * found.terms.down.double() + correction


def solved(inputs: Tensor, wanted: Tensor, ridge: float) -> Tensor:
    """Return `wanted (inputs + ridge m I)^-1`, (R, D), m the diagonal's mean; directions without input get nothing.

    Args:
        inputs: Mean products of inputs, (D, D).
        wanted: (R, D).
        ridge: From 0.
    """
    values, basis = torch.linalg.eigh(inputs)
    values = values.clamp(min=0)
    held = values + ridge * values.mean()
    live = held > values.max() * 1e-10
    found: Tensor = ((wanted @ basis) * torch.where(live, 1 / held, 0.0)) @ basis.T
    return found
