"""Site after site as it is merged: cut to a rank where asked, and told how far it is from the routed change."""

from collections.abc import Sequence

from torch import Tensor

from moadapt.adapters.delta import Delta
from moadapt.merging.calibration import relative_error
from moadapt.merging.deltas import Spectrum, total, truncated
from moadapt.merging.method import Blend, Merging, SiteMerge, plain
from moadapt.merging.site_adapters import SiteAdapters


class MergedSites:
    """Merges sites, and keeps in mind how far each is off.

    Args:
        merging: What is merged.
        merge: How.
        rank: To which every change is cut; None keeps all of it.
    """

    def __init__(self, merging: Merging, merge: SiteMerge, rank: int | None) -> None:
        self._merging, self._merge, self._rank = merging, merge, rank
        self._place_of = {path: place.name for place in merging.mixture.places for path in place.sites}
        self.errors: dict[str, float] = {}
        """Relative error of each site's change, by module path; 0 where nothing is routed or nothing is known."""
        self.spectra: dict[str, list[Spectrum]] = {}
        """Singular values of each site's change before it was cut."""

    def merge(self, at: SiteAdapters) -> list[Delta]:
        """Return the changes of a site that add up to the merged one.

        Args:
            at: The site.

        Raises:
            ValueError: The routing weighs heads or parameters, and the method goes by whole experts.
        """
        path, deltas = at.site.path, list(self._merge(at))
        if self._rank is not None:
            whole, self.spectra[path] = truncated(total(deltas), self._rank)
            deltas = [whole]
        self.errors[path] = self._error(at, deltas)
        return deltas

    def _error(self, at: SiteAdapters, deltas: Sequence[Delta]) -> float:
        place = self._place_of.get(at.site.path)
        fixed = self._merging.fixed
        weights = self._merge.weights.get(at.site.path) if isinstance(self._merge, Blend) else None
        if fixed is not None and place in fixed and not plain(fixed[place]):
            if weights is fixed[place] and self._rank is None:
                return 0.0  # of heads or parameters, just as they are
            raise ValueError(
                f"the router at {place} weighs heads or parameters, from which only method 'task' or 'mean_routing' "
                "makes a merge, and of full rank"
            )
        if fixed is None and not self._merging.rows:
            return 0.0
        found = self._merging.moments.get(place or "")
        if found is None:
            return 0.0 if self._rank is None else self._cut(at.site.path)
        merged = weights if isinstance(weights, Tensor) and self._rank is None else total(deltas)
        return relative_error(at.shared, at.own, found, merged)

    def _cut(self, path: str) -> float:
        """Return what cutting the rank has left out of a change that nothing routes, relative to it."""
        assert self._rank is not None, "it was cut"
        whole = sum(each.dropped(0) for each in self.spectra[path])
        lost = sum(each.dropped(self._rank) for each in self.spectra[path])
        return float((lost / whole) ** 0.5) if whole else 0.0
