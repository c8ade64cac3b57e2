"""RegMean: the map that does on each task's inputs what that task's expert does, in closed form.

Jin et al., "Dataless Knowledge Fusion by Merging Weights of Language Models", section 3, `W = (sum_e W_e G_e) (sum_e
G_e)^-1` with `G_e` the products of what enters the layer on task e's rows, numbers off the diagonal made smaller. On
changes of one frozen weight it reads the same, and in factors is `B^T N`. Axes: D features, R ranks of all experts.
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from moadapt.adapters.delta import Delta
from moadapt.input_means import Products
from moadapt.merging.calibration import rows_of_tasks
from moadapt.merging.factored import factored
from moadapt.merging.method import MergeMethod, Merging, SiteMerge
from moadapt.merging.regression import solved
from moadapt.merging.site_adapters import SiteAdapters
from moadapt.merging.statistics import running
from moadapt.registry import MERGES
from moadapt.sites import Site
from moadapt.tracing import SiteObservation

_RIDGE = 1e-6


@MERGES.register("regmean")
@dataclass(frozen=True, kw_only=True)
class RegMean(MergeMethod):
    """Finds the map that does on each task's inputs what its expert does; elsewhere than at linear layers, their mean.

    Args:
        shrinkage: Factor of products of two different features, from 0, their squares alone, to 1.

    Raises:
        ValueError: The factor is out of range.
    """

    shrinkage: float = 0.9

    always_reads_rows: ClassVar[bool] = True
    reads_tasks: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Check the range."""
        if not 0 <= self.shrinkage <= 1:
            raise ValueError(f"merge 'regmean' got shrinkage={self.shrinkage}; give a number from 0 to 1")

    def prepare(self, merging: Merging) -> SiteMerge:
        """Run each expert alone on the rows of its task."""
        experts = merging.mixture.experts
        products = {expert: _inputs(merging, experts[expert]) for expert in merging.chosen}
        return partial(self._merged, merging.even(), products)

    def _merged(self, even: Tensor, products: dict[int, dict[Site, Tensor]], at: SiteAdapters) -> list[Delta]:
        terms = factored(at)
        if terms is None:
            return at.blend(even)
        grams = {expert: self._shrunk(found[at.site]) for expert, found in products.items() if at.site in found}
        chosen = torch.isin(terms.owner, torch.tensor(list(grams)))
        terms = replace(terms, **{name: side[chosen] for name, side in vars(terms).items()})
        wanted = torch.cat([terms.down[terms.owner == e].double() @ gram for e, gram in grams.items()])
        whole = torch.stack(list(grams.values())).sum(dim=0)
        return [at.shared, terms.change(solved(whole, wanted, _RIDGE).to(terms.down), even)]

    def _shrunk(self, gram: Tensor) -> Tensor:
        return self.shrinkage * gram + (1 - self.shrinkage) * torch.diag(gram.diagonal())


def _inputs(merging: Merging, task: str) -> dict[Site, Tensor]:
    """Return the mean products of what enters linear sites on one task's rows, its expert alone at work, (D, D)."""
    mixture, products = merging.mixture, Products()
    reached: set[Site] = set()

    def note(seen: SiteObservation) -> None:
        if seen.routing is not None and seen.site.form == "linear":
            products.add(seen.site, seen.x)
            reached.add(seen.site)

    with mixture.override({task: 1.0}):
        for _ in running(mixture, rows_of_tasks(mixture, merging.rows, [task]), products, note):
            products.flush()
    return {site: mean.double() for site, mean in products.means(reached).items()}
