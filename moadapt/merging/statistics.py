"""Statistics of what enters linear sites while a mixture routes, streamed over calibration rows.

All that merges by least squares need of the rows is in them: with `h = A x` the stacked ranks and `u = w(x) * h` what
the routers make of them, the routed change is `B^T u`. Axes: N tokens, D features, E experts, R ranks of all experts.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moadapt.adapters.bank import Bank
from moadapt.input_means import Products
from moadapt.merging.calibration import Batch
from moadapt.merging.factored import Factored, factored
from moadapt.merging.site_adapters import SiteAdapters
from moadapt.mixture import Mixture
from moadapt.sites import Site
from moadapt.tracing import SiteObservation


@dataclass
class SiteStatistics:
    """Mean products at one site, in float64.

    Args:
        terms: The experts there.
        shrunk: Of `h` with itself, (R, R).
        cross: Of `h` with `u`, (R, R).
        routed: Of `u` with itself, (R, R).
        apart: Of `u` and of `h` with the input, (2, R, D); None where inputs were not asked for.
        inputs: Of the input with itself, (D, D), shared by sites that read the same; None likewise.
        count: How many tokens were averaged.
    """

    terms: Factored
    shrunk: Tensor
    cross: Tensor
    routed: Tensor
    apart: Tensor | None = None
    inputs: Tensor | None = None
    count: int = 0

    @classmethod
    def empty(cls, terms: Factored, *, with_inputs: bool) -> "SiteStatistics":
        """Return those of no token.

        Args:
            terms: The experts there.
            with_inputs: Whether products with the input are kept.
        """
        ranks, width = terms.down.shape
        zeros = terms.down.new_zeros
        shrunk, cross, routed = (zeros(ranks, ranks, dtype=torch.float64) for _ in range(3))
        apart = zeros(2, ranks, width, dtype=torch.float64) if with_inputs else None
        return cls(terms, shrunk, cross, routed, apart)

    def add(self, x: Tensor, weights: Tensor) -> None:
        """Take in some tokens.

        Args:
            x: (N, D).
            weights: Of the experts, (N|1, E).
        """
        shrunk = self.terms.shrink(x.to(self.terms.down))
        routed = shrunk * weights.to(shrunk)[:, self.terms.owner]
        self.shrunk += shrunk.T @ shrunk
        self.cross += shrunk.T @ routed
        self.routed += routed.T @ routed
        if self.apart is not None:
            self.apart += torch.stack([routed.T, shrunk.T]) @ x.to(shrunk)
        self.count += len(x)

    def averaged(self) -> "SiteStatistics":
        """Return sums as means."""
        shrunk, cross, routed = (total / self.count for total in (self.shrunk, self.cross, self.routed))
        apart = None if self.apart is None else self.apart / self.count
        return SiteStatistics(self.terms, shrunk, cross, routed, apart, self.inputs, self.count)


def site_statistics(mixture: Mixture, rows: Iterable[Batch], *, with_inputs: bool) -> dict[str, SiteStatistics]:
    """Run rows through a mixture, and return the statistics of every linear site with experts that they reach.

    Args:
        mixture: Run as it is, without gradients.
        rows: Calibration rows.
        with_inputs: Whether products with inputs are kept, which take (D, D) for all sites that read the same.
    """
    known = {at.site: terms for at in adapters_of(mixture) if (terms := factored(at)) is not None}
    found = {site: SiteStatistics.empty(terms, with_inputs=with_inputs) for site, terms in known.items()}
    products = Products()

    def note(seen: SiteObservation) -> None:
        if seen.routing is None or seen.site not in found:
            return
        if with_inputs:
            products.add(seen.site, seen.x)
        found[seen.site].add(*tokens(seen, products.real(seen.site, seen.x)))

    for _ in running(mixture, rows, products, note):
        products.flush()
    reached = {site: each.averaged() for site, each in found.items() if each.count}
    if with_inputs:
        for site, mean in products.means(reached).items():
            reached[site].inputs = mean.double()
    return {site.path: each for site, each in reached.items()}


def running(
    mixture: Mixture, rows: Iterable[Batch], products: Products, note: Callable[[SiteObservation], None]
) -> Iterator[Any]:
    """Run batch after batch without gradients, telling of every site, and give what the mixture returns.

    Args:
        mixture: That runs.
        rows: Batches.
        products: Learns which tokens are real.
        note: Takes a `SiteObservation`.
    """
    with torch.no_grad(), products.following(mixture.base), mixture.watch_sites(note):
        for batch in rows:
            products.begin(batch)
            yield mixture(**batch)


def adapters_of(mixture: Mixture) -> list[SiteAdapters]:
    """Return the adapters of every site of a mixture.

    Args:
        mixture: Whose.
    """
    banks: dict[Site, list[Bank]] = {}
    for site, bank in mixture.banks():
        banks.setdefault(site, []).append(bank)
    return [SiteAdapters(site, here, len(mixture.experts)) for site, here in banks.items()]


def tokens(seen: SiteObservation, real: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return what entered a site token by token, (N, D), and the weights of the experts there, (N|1, E).

    Args:
        seen: What was told of the site; it has a routing.
        real: Which tokens are no padding, (B, T); None where all count.

    Raises:
        ValueError: The routing has heads, or blends parameters.
    """
    routing, x = seen.routing, seen.x
    assert routing is not None, "of a site with experts"
    if routing.weights.shape[2] > 1 or routing.combines == "parameters":
        raise ValueError(
            f"the routing at {seen.site.path} weighs heads or parameters, so that no weights of whole experts come "
            "near it; merge with method 'task' for one task"
        )
    weights = routing.dense()[:, :, 0]
    x = x.unsqueeze(0) if x.ndim == 2 else x
    if weights.shape[:2] == (1, 1):
        return (x.flatten(0, 1) if real is None else x[real.bool()]), weights[0]
    weights = weights.expand(*x.shape[:2], -1)
    if real is None:
        return x.flatten(0, 1), weights.flatten(0, 1)
    return x[real.bool()], weights[real.bool()]
