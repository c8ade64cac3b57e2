"""Routers that are fitted instead of trained: from the adapters themselves, from examples, or from their loss.

Places are fitted in the order in which the base reaches them. What a place is fitted on is what reaches it in use: the
places before it route as they were fitted, and later ones give no expert any weight. Axes: N examples, D features, E
experts, R ranks.
"""

from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor

from moadapt.adapters.delta import Factors
from moadapt.answer_losses import answer_losses
from moadapt.context import routers_of
from moadapt.merging.calibration import Batch, as_batches
from moadapt.mixture import Mixture
from moadapt.places import Place
from moadapt.router import Router, RoutingContext
from moadapt.routing import Routing
from moadapt.tracing import Observation


@dataclass(frozen=True)
class Examples:
    """What reaches a place in example rows.

    Args:
        features: One vector a row, as `RoutingContext.pooled` gives it, (N, D).
        experts: Index of the expert that bears the name of the row's task; -1 where none does, (N,).
    """

    features: Tensor
    experts: Tensor

    def __getitem__(self, rows: slice | Tensor) -> "Examples":
        """Return some of the rows."""
        return Examples(self.features[rows], self.experts[rows])


@dataclass(frozen=True)
class Fitting:
    """What the router of one place can be fitted from; each is found when it is first asked for.

    Args:
        experts: Names of the experts.
        find_factors: Returns the adapters at the place in low-rank form.
        find_examples: Returns what reaches the place.
        loss: Returns the mean loss of an answer's token in the examples, in nats, where every input gets these weights
            at every place, (E,).
        route: Returns what a router decides at the place, batch by batch, the rows in the order of the examples.
    """

    experts: tuple[str, ...]
    find_factors: Callable[[], Factors] = field(repr=False)
    find_examples: Callable[[], Examples] = field(repr=False)
    loss: Callable[[Tensor], float] = field(repr=False)
    route: Callable[[Router], list[Routing]] = field(repr=False)

    @cached_property
    def factors(self) -> Factors:
        """The adapters at the place in low-rank form."""
        return self.find_factors()

    @cached_property
    def examples(self) -> Examples:
        """What reaches the place."""
        return self.find_examples()


class FittedRouter(Router):
    """A router whose tensors are found by `fit`; until then it has none, and does not route."""

    state: ClassVar[tuple[str, ...]]
    """Names of its tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.forget()

    def remember(self, **found: Tensor) -> None:
        """Take what was found, a tensor for each name of `state`."""
        for name in self.state:
            self.register_buffer(name, found[name].detach())

    def forget(self) -> None:
        """Be as if never fitted."""
        for name in self.state:
            self.register_buffer(name, None)

    @property
    def fitted(self) -> bool:
        """Whether it can route."""
        return all(getattr(self, name) is not None for name in self.state)

    def found(self, name: str) -> Tensor:
        """Return one of its tensors.

        Raises:
            ValueError: It was not fitted yet.
        """
        tensor = getattr(self, name)
        if tensor is None:
            raise ValueError(
                f"{type(self).__name__} was not fitted to these adapters; call moadapt.fit_router(mixture, batches), "
                "or run `moadapt route` with --fit"
            )
        assert isinstance(tensor, Tensor), "a buffer"
        return tensor

    @abstractmethod
    def shapes(self) -> dict[str, tuple[int | None, ...]]:
        """Return the shape of each tensor, None where fitting decides."""

    def make_room(self, stored: Mapping[str, Tensor]) -> None:
        """Take the shapes of what was saved, where they are possible ones."""
        for name, shape in self.shapes().items():
            given = stored.get(name)
            fits = (
                given is not None
                and len(shape) == given.ndim
                and all(own in (None, size) for own, size in zip(shape, given.shape, strict=True))
            )
            self.register_buffer(name, torch.empty_like(given) if fits and given is not None else None)

    def grow(self, count: int) -> None:
        """Forget everything: what is new was not seen."""
        self.forget()


def fit_router(mixture: Mixture, batches: Batch | Iterable[Batch] = ()) -> None:
    """Fit the routers of a mixture, at all of its places.

    Fit again when adapters have changed since: routers do not notice.

    Args:
        mixture: Whose routers.
        batches: One batch or several of what the mixture takes, with `task` where a router learns who serves whom; none
            for routers that look at adapters alone.

    Raises:
        ValueError: The router is trained and not fitted, or it cannot be fitted from what is there.
    """
    spec = mixture.spec.router
    if spec is None or not spec.fits_from:
        name = "a mixture without experts" if spec is None else type(spec).__name__
        raise ValueError(f"{name} has nothing to fit; train it, or moadapt.reroute(mixture, router) to one that has")
    given = [] if isinstance(batches, Sequence) and not batches else as_batches(batches)
    if spec.fits_from - {"adapters"} and not given:
        raise ValueError(f"{type(spec).__name__} is fitted from {' and '.join(sorted(spec.fits_from))}; give batches")
    with mixture.evaluating(), torch.no_grad():
        for index, router in enumerate(routers_of(mixture.routers)):
            router.fit(_fitting(mixture, index, given))
            router.to(mixture.base.device)


def loss_of_weights(mixture: Mixture, batches: Iterable[Batch], weights: Tensor) -> float:
    """Return the mean loss of an answer's token, in nats, where every input gets the same weights at every place.

    Args:
        mixture: In evaluation mode.
        batches: What it takes, with labels.
        weights: Of the experts, (E,).
    """
    total = count = 0.0
    with mixture.override(dict(zip(mixture.experts, weights.tolist(), strict=True))):
        for batch in batches:
            losses, counts = answer_losses(mixture, batch)
            total, count = total + float(losses.sum()), count + float(counts.sum())
    return total / count


def _fitting(mixture: Mixture, index: int, batches: Sequence[Batch]) -> Fitting:
    place = mixture.places[index]
    return Fitting(
        mixture.experts,
        lambda: _factors(mixture, place),
        lambda: _examples(mixture, index, batches),
        lambda weights: loss_of_weights(mixture, batches, weights),
        lambda router: [each.routing for _, each in _observed(mixture, index, batches, router)],
    )


def _factors(mixture: Mixture, place: Place) -> Factors:
    """Return the low-rank forms at the one site of a place, those of several banks joined."""
    (path,) = place.sites
    found = []
    for site, bank in mixture.banks():
        experts = set(bank.names) & set(mixture.experts)
        if site.path != path or not experts:
            continue
        factors = bank.low_rank()
        if factors is None:
            raise ValueError(
                f"{path}: {', '.join(sorted(experts))} of family {bank.family.__name__} have no low-rank form that a "
                "router could look at; choose a router that is fitted from examples, such as prototypes"
            )
        found.append(factors)
    return Factors.join(found)


def _examples(mixture: Mixture, index: int, batches: Sequence[Batch]) -> Examples:
    features, experts = [], []
    for batch, seen in _observed(mixture, index, batches, None):
        features.append(seen.seen.pooled)
        experts.append(mixture.expert_ids(batch.get("task"), len(features[-1])))
    if not features:
        place = mixture.places[index].name
        raise ValueError(f"no example reached the router at {place}; give batches that run it, with images for a tower")
    return Examples(torch.cat(features), torch.cat(experts))


def _observed(
    mixture: Mixture, index: int, batches: Sequence[Batch], router: Router | None
) -> Iterator[tuple[Batch, Observation]]:
    """Give what a place decided in each batch that reached it, or what it saw, where there is no router to decide."""
    place, routers = mixture.places[index], routers_of(mixture.routers)
    nothing = Routing.constant(torch.zeros(len(mixture.experts), device=mixture.base.device))
    later = zip(mixture.places[index:], routers[index:], strict=True)
    deciding: dict[str, Router] = {other.name: _StandIn(own, nothing) for other, own in later}
    if router is not None:
        deciding[place.name] = router
    for batch in batches:
        with mixture.context.standing_in(deciding), mixture.observe() as found:
            mixture(**batch)
        yield from ((batch, each) for each in found if each.place == place.name)


class _StandIn(Router):
    """Gives one routing whatever comes.

    Args:
        router: In whose place.
        routing: What it gives.
    """

    needs: ClassVar[frozenset[str]] = frozenset()

    def __init__(self, router: Router, routing: Routing) -> None:
        super().__init__()
        self.needs = router.needs  # type: ignore[misc]
        self.routing = routing

    def forward(self, context: RoutingContext) -> Routing:
        return self.routing

    def grow(self, count: int) -> None:
        raise AssertionError("it stands in for one fitting")

    def trim(self, keep: Sequence[int]) -> None:
        raise AssertionError("it stands in for one fitting")
