"""Merge by fixed weights that come nearest to the routed outputs on calibration rows, site by site.

With `B^T u(x)` what the routed experts add, the weights minimise `E ||sum_e a_e DW_e x - B^T u(x)||^2`, a system (E, E)
a site. Axes: E experts, R ranks of all experts.
"""

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from moadapt.adapters.delta import Delta
from moadapt.merging.method import Blend, MergeMethod, Merging, SiteMerge
from moadapt.merging.site_adapters import SiteAdapters
from moadapt.merging.statistics import SiteStatistics, site_statistics
from moadapt.registry import MERGES


@MERGES.register("least_squares")
@dataclass(frozen=True, kw_only=True)
class LeastSquares(MergeMethod):
    """Finds the weights of each site whose outputs come nearest to the routed ones.

    Elsewhere than at linear layers it is the mean routing.
    """

    def prepare(self, merging: Merging) -> SiteMerge:
        """Gather statistics, unless the routing is fixed and so exact."""
        blend = Blend(merging.by_site(merging.weights()))
        if merging.fixed is not None:
            return blend
        found = site_statistics(merging.mixture, merging.rows, with_inputs=False)
        return partial(_merged, found, blend)


def nearest_weights(found: SiteStatistics, start: Tensor) -> Tensor:
    """Return the weights that come nearest, (E,), and among those the nearest to others, where several do.

    Args:
        found: At one site.
        start: The others, (E,), such as the mean routing.
    """
    terms, exact = found.terms, start.double()
    gram = terms.up.double() @ terms.up.double().T
    member = torch.nn.functional.one_hot(terms.owner, len(start)).double()
    system = member.T @ (gram * found.shrunk) @ member
    wanted = (member.T @ (gram * found.cross)).sum(dim=1)
    inverse: Tensor = torch.linalg.pinv(system, hermitian=True, rtol=1e-10)
    return exact + inverse @ (wanted - system @ exact)


def _merged(found: dict[str, SiteStatistics], blend: Blend, at: SiteAdapters) -> list[Delta]:
    here, start = found.get(at.site.path), blend.weights.get(at.site.path)
    if here is None or not isinstance(start, Tensor):
        return blend(at)
    return at.blend(nearest_weights(here, start).float())
