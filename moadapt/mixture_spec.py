"""What a user chose for a mixture: its adapters, its router and where they sit."""

from collections.abc import Mapping
from dataclasses import dataclass

from moadapt.adapters.bank import Adapter
from moadapt.adapters.family import FamilySpec
from moadapt.names import SHARED, check_names
from moadapt.placement import Placement
from moadapt.router import RouterSpec
from moadapt.sites import Anatomy, Site


@dataclass(frozen=True)
class MixtureSpec:
    """All that a user chose: enough, with a base, to build the mixture again.

    Args:
        experts: Experts by name, in order.
        shared: The adapter that every input uses.
        router: Gives the experts their weights.
        placement: Where adapters sit that name no placement of their own.

    Raises:
        ValueError: A name is unsafe, there is no adapter, or the router is missing or too many.
    """

    experts: Mapping[str, FamilySpec]
    shared: FamilySpec | None
    router: RouterSpec | None
    placement: Placement

    def __post_init__(self) -> None:
        """Check names, and that experts and router come together."""
        check_names(self.experts)
        if self.shared is None and not self.experts:
            raise ValueError("got neither shared nor experts; give at least one adapter")
        if bool(self.experts) != (self.router is not None):
            raise ValueError(
                f"got {len(self.experts)} experts and {'a' if self.router else 'no'} router; experts need a router, "
                "such as moadapt_routers.ByTask(), and a router needs experts"
            )

    def adapters(self) -> tuple[Adapter, ...]:
        """Return the shared adapter, then the experts."""
        shared = [] if self.shared is None else [Adapter(SHARED, self.shared, None)]
        return (*shared, *(Adapter(name, spec, i) for i, (name, spec) in enumerate(self.experts.items())))

    def sites(self, found: Anatomy) -> dict[Site, list[Adapter]]:
        """Return the sites, those that are read in model order first, each with the adapters that sit there.

        Raises:
            ValueError: An adapter's placement matches nothing, or no expert sits anywhere.
        """
        adapters = self.adapters()
        chosen = {a.name: set(a.spec.sites(found, self.placement)) for a in adapters}
        if self.experts and not any(chosen[name] for name in self.experts):
            raise ValueError("no expert sits anywhere; give one of them a rank above 0 at a site")
        every = (*found.sites, *found.unread)
        sites = {site: [a for a in adapters if site in chosen[a.name]] for site in every}
        return {site: here for site, here in sites.items() if here}
