"""What a merge method is: it looks at a mixture once, and then turns the adapters of one site after the other into one.

A method never needs all sites at a time, so that a merge may run from file to file.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor

from moadapt.adapters.delta import Delta
from moadapt.context import routers_of
from moadapt.merging.calibration import Batch, Moments, moments
from moadapt.merging.site_adapters import SiteAdapters
from moadapt.mixture import Mixture
from moadapt.router import RoutingContext
from moadapt.routing import Routing

SiteMerge = Callable[[SiteAdapters], Sequence[Delta]]
"""Turns the adapters of a site into the changes that add up to the merged one."""


@dataclass(frozen=True)
class Merging:
    """What is merged, for which tasks, and the rows that a method may look at.

    Args:
        mixture: In evaluation mode.
        tasks: Names of the tasks that the merge serves; none for all.
        rows: Batches that the merge is made from, of those tasks; may be empty.
    """

    mixture: Mixture
    tasks: tuple[str, ...] = ()
    rows: Sequence[Batch] = ()

    @property
    def chosen(self) -> tuple[int, ...]:
        """Indices of the experts that bear the names of the tasks; of all where no tasks were named, or none does."""
        experts = self.mixture.experts
        return tuple(i for i, name in enumerate(experts) if name in self.tasks) or tuple(range(len(experts)))

    def even(self, weight: float | None = None) -> Tensor:
        """Return weights (E,) that are the same for all chosen experts and 0 for others.

        Args:
            weight: Of each; by default they sum to 1.
        """
        weights = torch.zeros(len(self.mixture.experts))
        weights[list(self.chosen)] = 1 / max(len(self.chosen), 1) if weight is None else weight
        return weights

    @cached_property
    def fixed(self) -> dict[str, Routing] | None:
        """How every place routes, where that is the same for all inputs that the merge serves; else None."""
        router, override = self.mixture.spec.router, self.mixture.context.override
        places = self.mixture.places
        if override is not None or router is None:
            return {} if override is None else dict.fromkeys([place.name for place in places], override)
        if router.depends_on == "input" or (router.depends_on == "task" and len(self.tasks) != 1):
            return None
        known = self.mixture.tasks
        ids = torch.tensor([known.index(name) if name in known else -1 for name in self.tasks[:1]]) if known else None
        ids = None if router.depends_on == "nothing" else ids
        return {p.name: self._routed(i, ids) for i, p in enumerate(places)}

    def _routed(self, index: int, ids: Tensor | None) -> Routing:
        router = routers_of(self.mixture.routers)[index]
        device = next((t.device for t in (*router.parameters(), *router.buffers())), torch.device("cpu"))
        with torch.no_grad():
            seen = RoutingContext(
                task_ids=None if ids is None else ids.to(device), available=self.mixture.context.available
            )
            routing: Routing = router(seen)
        return routing.detached()

    @cached_property
    def moments(self) -> dict[str, Moments]:
        """Moments of the routing by place."""
        if self.fixed is None:
            return moments(self.mixture, self.rows)
        return {name: Moments.of(routing.dense().reshape(-1)) for name, routing in self.fixed.items() if plain(routing)}

    def weights(self) -> dict[str, Tensor | Routing]:
        """Return the weights that come nearest to the routing by place: its own where it is fixed, else its mean."""
        if self.fixed is not None:
            told = self.fixed.items()
            return {name: each.dense().reshape(-1).cpu() if plain(each) else each for name, each in told}
        return {name: found.mean.float() for name, found in self.moments.items()}

    def by_site(self, of_places: Mapping[str, Tensor | Routing]) -> dict[str, Tensor | Routing]:
        """Return what belongs to places by the module path of each of their sites.

        Args:
            of_places: By name of the place.

        Raises:
            ValueError: A place has none, as no calibration batch reached it.
        """
        missing = [place for place in self.mixture.places if place.name not in of_places]
        if missing:
            raise ValueError(
                f"no calibration batch reached the router at {missing[0].name}, which serves {missing[0].sites[0]} and "
                "others; give batches that run its sites too, with images for a vision tower"
            )
        return {path: of_places[place.name] for place in self.mixture.places for path in place.sites}


class MergeMethod(ABC):
    """A way to turn the adapters of every site into one change of its weights; a frozen dataclass of its options."""

    reads_rows: ClassVar[bool] = True
    """Whether it takes calibration rows where routing depends on the input."""
    always_reads_rows: ClassVar[bool] = False
    """Whether it takes calibration rows whatever the routing."""
    reads_labels: ClassVar[bool] = False
    """Whether these rows need labels."""
    reads_tasks: ClassVar[bool] = False
    """Whether these rows need the names of their tasks."""

    @abstractmethod
    def prepare(self, merging: Merging) -> SiteMerge:
        """Look at the mixture as a whole, and return what merges one site.

        Args:
            merging: What to merge.

        Raises:
            ValueError: The method cannot merge it.
        """


@dataclass(frozen=True)
class Blend:
    """Merges sites by fixed weights, exactly.

    Args:
        weights: Of the experts, by module path; sites without any have no experts.
    """

    weights: Mapping[str, Tensor | Routing]

    def __call__(self, at: SiteAdapters) -> list[Delta]:
        """Return the changes of a site, one a family."""
        return at.blend(self.weights.get(at.site.path, torch.zeros(at.num_experts)))


def plain(routing: Routing) -> bool:
    """Tell whether a routing weighs the outputs of experts as wholes, without heads."""
    return routing.combines == "outputs" and routing.weights.shape[2] == 1
